"""The tables of docs/planning.md and of measured runs in benchmarks/RESULTS.md are what the planner says."""

from benchmarks.plan_guide import PAGES, tables, with_tables


def test_the_tables_of_the_pages_are_true() -> None:
    new = tables()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        assert with_tables(page, new) == page, f"{path}: run `python -m benchmarks.plan_guide`"
    assert sum(f"<!-- {mark} -->" in path.read_text(encoding="utf-8") for mark in new for path in PAGES) == len(new)
