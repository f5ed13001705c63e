"""The pages that commands write: a block is replaced whole, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.page import read_block, write_block


def test_a_block_is_replaced_where_it_stands_and_the_prose_stays(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- block: a -->\nold\n<!-- end: a -->\n\nProse.\n")
    write_block(page, "a", "new\nlines\n")
    write_block(page, "b", "added")
    assert page.read_text() == (
        "# Title\n\n<!-- block: a -->\nnew\nlines\n<!-- end: a -->\n\nProse.\n\n"
        "<!-- block: b -->\nadded\n<!-- end: b -->\n"
    )
    write_block(page, "b", "once more")
    assert (read_block(page, "a"), read_block(page, "b")) == ("new\nlines", "once more")


def test_a_block_without_an_end_is_refused_and_left(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("<!-- block: a -->\nold\n")
    with pytest.raises(ValueError, match="block a has no line"):
        write_block(page, "a", "new")
    assert page.read_text() == "<!-- block: a -->\nold\n"
