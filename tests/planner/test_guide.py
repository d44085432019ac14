"""docs/planning.md's tables are what the planner says."""

from benchmarks.plan_guide import PAGE, with_tables


def test_the_tables_of_the_page_are_true() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run `python -m benchmarks.plan_guide`"
