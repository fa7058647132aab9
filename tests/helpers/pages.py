"""The documentation as the tests read it: its pages, their links and headings, and the code blocks that can be run."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NEEDS = 'title="needs '  # marks a block that tests only read: what it needs is not here
FENCE = re.compile(r"^(\s*)```(.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced code block: what stands behind the fence, its text, and its first line's number in the page."""

    info: str
    text: str
    line: int

    @property
    def runs(self) -> bool:
        return self.info.split(" ")[0] in ("python", "diff") and NEEDS not in self.info

    @property
    def source(self) -> str:
        """Python to run, its lines where they stand in the page; of a diff what it ends in."""
        lines = self.text.splitlines()
        if self.info == "diff":
            lines = [line[1:] for line in lines if not line.startswith("-")]
        return "\n" * (self.line - 1) + "\n".join(lines) + "\n"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def parts(text: str) -> tuple[list[Block], str]:
    """The code blocks of a page, and the page without them."""
    blocks, prose, inside, indent = [], [], None, ""
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if inside is None and fence:
            inside, indent = Block(fence[2].strip(), "", number + 1), fence[1]
        elif inside is not None and fence and not fence[2].strip():
            blocks.append(inside)
            inside = None
        elif inside is not None:
            inside = Block(inside.info, inside.text + line.removeprefix(indent) + "\n", inside.line)
        else:
            prose.append(line)
    if inside is not None:
        raise ValueError(f"the code block of line {inside.line - 1} has no end")
    return blocks, "\n".join(prose)


def anchors(text: str) -> set[str]:
    """The headings of a page, as both GitHub and Python-Markdown write them in an address."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ +(.*?)#*$", parts(text)[1], flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        names.add(name if not found[name] else f"{name}_{found[name]}")
        found[name] += 1
    return names


def links(text: str) -> list[str]:
    """Where the links of a page lead, but for those to other sites."""
    prose = re.sub(r"`[^`\n]*`", "", parts(text)[1])
    return [link for link in re.findall(r"]\(\s*([^)\s]+)", prose) if not re.match(r"https?:|mailto:", link)]


def broken(page: Path, text: str, site: bool = True) -> list[str]:
    """The links of a page that lead nowhere; on a page of the site also those that lead out of it."""
    wrong = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if path.startswith("/") or not target.is_file() or (site and DOCS not in target.parents):
            wrong.append(link)
        elif anchor and anchor not in anchors(text if target == page else target.read_text(encoding="utf-8")):
            wrong.append(link)
    return wrong


def placed() -> list[str]:
    """The pages in the navigation of the site."""

    def walk(entry):
        for value in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else [entry]:
            yield from [value] if isinstance(value, str) else walk(value)

    return list(walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
