"""The page from which a text index is searched: one document, no resource from elsewhere, light and dark."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quernel text search</title>
<style>
:root { color-scheme: light dark; --line: #8886; --soft: #767676; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
form { display: flex; gap: 0.5rem; }
input { flex: 1; font: inherit; padding: 0.5rem 0.75rem; border: 1px solid var(--line); border-radius: 0.4rem; }
button { font: inherit; padding: 0.5rem 1rem; border: 1px solid var(--line); border-radius: 0.4rem; }
#status { color: var(--soft); min-height: 1.5rem; margin: 0.75rem 0; }
ol { list-style: none; padding: 0; margin: 0; }
li { border-top: 1px solid var(--line); padding: 0.75rem 0; }
.place { color: var(--soft); font-size: 0.875rem; display: flex; justify-content: space-between; gap: 1rem; }
.text { margin: 0.25rem 0 0; white-space: pre-line; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Text search</h1>
<form id="form" role="search">
<input id="query" type="search" aria-label="What are you looking for?" autofocus autocomplete="off" required>
<button>Search</button>
</form>
<p id="status" role="status"></p>
<ol id="hits"></ol>
<script>
"use strict";
const form = document.getElementById("form"), query = document.getElementById("query");
const status = document.getElementById("status"), list = document.getElementById("hits");
let asked = 0;

function element(kind, name, text) {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

function show(answer) {
  list.replaceChildren(...answer.hits.map((hit) => {
    const item = document.createElement("li"), place = element("div", "place", "");
    place.append(element("span", "file", hit.file + ", line " + hit.line));
    place.append(element("span", "score", hit.score.toFixed(3)));
    item.append(place, element("p", "text", hit.text));
    return item;
  }));
  const seconds = answer.seconds.toFixed(2);
  const found = answer.hits.length;
  status.textContent = found ? found + " passages in " + seconds + " s" : "Nothing was found.";
}

async function search(text, remember) {
  const mine = ++asked;
  status.textContent = "Searching…";
  try {
    const reply = await fetch("api/search?" + new URLSearchParams({ q: text, k: "10" }));
    const answer = await reply.json();
    if (mine !== asked) return;
    if (!reply.ok) throw new Error(answer.error);
    show(answer);
    if (remember) history.pushState(null, "", "?" + new URLSearchParams({ q: text }));
  } catch (error) {
    if (mine === asked) { list.replaceChildren(); status.textContent = "No answer: " + error.message; }
  }
}

function restore() {
  const text = new URLSearchParams(location.search).get("q") || "";
  query.value = text;
  if (text) search(text, false);
  else { asked++; list.replaceChildren(); about(); }
}

async function about() {
  const mine = asked;
  const found = await (await fetch("api/info")).json();
  if (mine === asked) status.textContent = found.passages + " passages of " + found.files + " files";
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (query.value.trim()) search(query.value, true);
});
addEventListener("popstate", restore);
restore();
</script>
</body>
</html>
"""
