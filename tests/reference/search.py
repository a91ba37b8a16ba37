"""Indexes in plain Python, written from their definitions."""

from collections import defaultdict


def flinng(codes, groups, queries, k):
    """Answer queries by group tests: lists of (score, item), at most k a query.

    codes: one list of L codes an item; groups: one list of R groups an item; queries: one list of L codes each.
    """
    rows = len(groups[0]) if groups else 0
    tables = len(queries[0]) if queries else 0
    cells_of_code, members = defaultdict(set), defaultdict(list)
    for item, (own_codes, own_groups) in enumerate(zip(codes, groups, strict=True)):
        for row, group in enumerate(own_groups):
            members[row, group].append(item)
            for table, code in enumerate(own_codes):
                cells_of_code[table, code].add((row, group))
    answers = []
    for query in queries:
        counts = defaultdict(int)
        for table, code in enumerate(query):
            for cell in cells_of_code[table, code]:
                counts[cell] += 1
        hits, answer = defaultdict(int), []
        # Most counted first; equal counts by ascending repetition and group, members by ascending item.
        for cell in sorted(counts, key=lambda cell: (-counts[cell], cell)):
            for item in members[cell]:
                hits[item] += 1
                if hits[item] == rows:
                    answer.append((counts[cell] / tables, item))
        answers.append(answer[:k])
    return answers


def expected_count(codes, query, item, n_groups):
    """Return the mean over random partitions of the count that the group of ``item`` gets from ``query``."""
    total = 0.0
    for table, code in enumerate(query):
        if codes[item][table] == code:
            total += 1
        else:
            others = sum(row[table] == code for i, row in enumerate(codes) if i != item)
            total += 1 - (1 - 1 / n_groups) ** others
    return total
