"""A link in the docs that leads nowhere is found."""

from pathlib import Path

from localstack.doclinks import broken_links


def test_a_broken_link_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("fine")
    page = tmp_path / "page.md"
    page.write_text("[ok](there.md) [ok](https://example.org)\n[gone](nowhere.md#part)\n")
    assert broken_links([page]) == [f"{page}:2: nowhere.md#part does not exist"]
