(() => {
  "use strict";
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("js");

  // Light and dark: the system's choice until the button says otherwise.
  const theme = document.getElementById("theme");
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => {
    const other = isDark() ? "Light" : "Dark";
    theme.textContent = other;
    theme.setAttribute("aria-label", `Use ${other.toLowerCase()} colours`);
  };
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  nameTheme();

  // A group of buttons of which one is pressed.
  const choose = (buttons, act) => {
    for (const button of buttons) {
      button.addEventListener("click", () => {
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        act(button);
      });
    }
  };

  // Pareto plot: by size or by latency.
  const views = all("[data-view]");
  const show = (name) => { for (const view of views) view.hidden = view.dataset.view !== name; };
  if (views.length > 1) show(views[0].dataset.view);
  choose(all("[data-show]"), (button) => show(button.dataset.show));

  // Tooltip: the text of a mark's <title>, on hover and on focus.
  const tip = document.getElementById("tip");
  let shown = null;
  const hideTip = () => { tip.hidden = true; shown = null; };
  for (const mark of all(".mark")) {
    const title = mark.querySelector("title");
    mark.setAttribute("aria-label", title.textContent);
    title.remove(); // else the browser would show it a second time
  }
  const showTip = (mark) => {
    shown = mark;
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const at = (mark.querySelector(".dot") || mark).getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const left = at.left + at.width / 2 - box.width / 2;
    const above = at.top - box.height - 24; // clear of the point's own label
    tip.style.left = `${Math.max(8, Math.min(left, root.clientWidth - box.width - 8))}px`;
    tip.style.top = `${above >= 8 ? above : at.bottom + 12}px`;
  };
  for (const drawing of all("[data-walk]")) {
    const marks = all(".mark", drawing);
    const markOf = (event) => event.target.closest(".mark");
    drawing.addEventListener("pointerover", (event) => { if (markOf(event)) showTip(markOf(event)); });
    drawing.addEventListener("pointerout", hideTip);
    drawing.addEventListener("focusin", (event) => { if (markOf(event)) showTip(markOf(event)); });
    drawing.addEventListener("focusout", hideTip);
    drawing.addEventListener("keydown", (event) => {
      const here = marks.indexOf(markOf(event));
      const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: marks.length - 1 }[event.key];
      if (event.key === "Escape") hideTip();
      if (to === undefined || !marks[to]) return;
      event.preventDefault();
      marks[here].tabIndex = -1;
      marks[to].tabIndex = 0;
      marks[to].focus();
    });
  }
  // Focus may scroll a mark into view: the tooltip follows.
  addEventListener("scroll", () => { if (shown) showTip(shown); }, { capture: true, passive: true });

  // Sorting: numbers largest first, names naturally (layer.2 before layer.10), missing values last.
  const compare = new Intl.Collator(undefined, { numeric: true }).compare;
  for (const table of all("table[data-sort]")) {
    const heads = all("thead th", table);
    heads.forEach((head, column) => {
      const numeric = head.classList.contains("num");
      head.querySelector("button").addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const up = before ? before === "descending" : !numeric;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.v;
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          return (up ? 1 : -1) * (numeric ? x - y : compare(x, y));
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // Filtering the layers.
  const find = document.getElementById("find");
  if (find) {
    const rows = all("#layers tbody tr");
    let kept = "all";
    const apply = () => {
      const words = find.value.toLowerCase().split(/\s+/);
      let count = 0;
      for (const row of rows) {
        const untouched = row.classList.contains("untouched");
        const wanted = kept === "all" || untouched === (kept === "untouched");
        row.hidden = !(wanted && words.every((word) => row.dataset.search.includes(word)));
        count += !row.hidden;
      }
      document.getElementById("shown").textContent = `${count} shown`;
    };
    find.addEventListener("input", apply);
    choose(all("[data-filter]"), (button) => { kept = button.dataset.filter; apply(); });
  }
})();
