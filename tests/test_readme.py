"""README.md and docs/: what they name is there, what they command is accepted, what they show is what is stored."""

import argparse
import importlib
import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from bench import gpu, speed
from extras import anatomy, cli, docs, drawing, gather, predict, report, tour
from extras.docs_stored import FIGURES
from tests import hostile

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in docs.pages()}
README, COURSE = PAGES["README.md"], PAGES["docs/course.md"]


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(text):
    """A page without its code, and without what is filled in."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", docs.BLOCK.sub("", text), flags=re.MULTILINE | re.DOTALL)


def test_the_readme_fits_on_a_few_screens():
    assert README.count("\n") <= 150


def test_filling_the_pages_again_changes_nothing():
    assert [name for name, text in PAGES.items() if docs.fill(text) != text] == []
    used = {name for text in PAGES.values() for _, name, _ in docs.BLOCK.findall(text)}
    assert used == docs.BLOCKS.keys()


def test_a_block_that_is_stale_would_be_seen():
    page = "a\n<!-- text losses-verdict -->\nL_s is 5 times L_f.\n<!-- end -->\nb\n"
    assert docs.fill(page) != page and docs.fill(docs.fill(page)) == docs.fill(page)


def anchors(page):
    """What GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in heads]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_and_picture_leads_somewhere(name):
    text = re.sub(r"^```.*?^```", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = unquote(target).partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not target.startswith("https://"):
            known = file.exists() and (not anchor or anchor in anchors(file))
            wrong += [] if known else [target]
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_every_name_of_a_file_or_function_is_true(name):
    """`losses.py`, `extras/released.py`, `fusion.Block.attend`: whatever is set as code and looks like one."""
    wrong = []
    for word in re.findall(r"`([^`\n]+)`", docs.BLOCK.sub("", PAGES[name])):
        if re.fullmatch(r"(?!data/|runs/)[\w/.-]+\.(py|md|svg|png|sh)|(extras|bench|tests|docs)/", word):
            generated = word.split("/")[0] in ("report.md", "tour.md")
            wrong += [] if generated or (ROOT / word).exists() else [word]
        elif re.fullmatch(r"(losses|fusion|magtkd|encoders|data|extras\.\w+)\.(?!safetensors)\w+(\.\w+)*", word):
            wrong += [] if find(word) else [word]
    assert wrong == []


def find(dotted):
    """A function or class by its dotted name; None if there is none."""
    parts = dotted.split(".")
    at = 2 if parts[0] in ("extras", "bench") else 1
    thing = importlib.import_module(".".join(parts[:at]))
    for part in parts[at:]:
        thing = getattr(thing, part, None)
    return thing


class Accepted(Exception):
    pass


PARSERS = {"predict": predict.main, "tour": tour.main, "gpu": gpu.main}
MODULES = {"extras.docs": docs.main, "extras.gather": gather.main, "extras.anatomy": anatomy.main}
MODULES |= {"bench.speed": speed.main, "bench.gpu": gpu.main, "tests.hostile": lambda argv: hostile.main()}
BARE = (["bash", "run.sh", "test"], ["bash", "run.sh", "bench"], ["python", "-m", "bench.plots"])  # no options


def commands(text):
    """Lines of the ```bash blocks, and what stands as `python ..` or `bash ..` in the text; without here-documents."""
    shown = re.sub(r"<<'END'\n.*?^END$", "", "".join(blocks("bash", text)), flags=re.MULTILINE | re.DOTALL)
    lines = [*shown.splitlines(), *re.findall(r"`((?:python|bash) [^`\n]+)`", text)]
    return [line for line in lines if line.strip() and not line.startswith("cat >")]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_accepted(name, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, argv=None, namespace=None):
        parse(parser, argv, namespace)
        raise Accepted

    for line in commands(PAGES[name]):
        words = [word.removeprefix("PYTHON=") for word in shlex.split(line, comments=True)]
        while words[0] not in ("bash", "python"):  # PYTHON=/path/to/python before it
            words = words[1:]
        if words in BARE or words[-1] == "--help":
            continue
        start, rest = words[:2], words[2:]
        if start == ["bash", "run.sh"] and rest[0] not in PARSERS or start == ["python", "magtkd.py"]:
            cli.parse(rest)
            continue
        main, argv = (PARSERS[rest[0]], rest[1:]) if start[0] == "bash" else (MODULES[rest[0]], rest[1:])
        with monkeypatch.context() as m, pytest.raises(Accepted):
            m.setattr(argparse.ArgumentParser, "parse_args", stop)
            m.setattr(sys, "argv", ["program", *argv])  # for a main without arguments
            main(argv)


def test_a_wrong_command_would_be_seen(capsys):
    with pytest.raises(SystemExit):
        cli.parse(shlex.split("iemocap --rot DIR"))


def test_the_snippet_of_the_losses_runs_as_it_stands():
    (snippet,) = blocks("python", README)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["loss"].isfinite() and names["features"].grad.isfinite().all()


def test_what_the_table_of_losses_says():
    import losses

    torch.manual_seed(0)
    logits, features = torch.randn(2, 1, 5), torch.randn(2, 1, 8)
    assert float(losses.feature_loss(*features)) == pytest.approx(0)  # B = 1
    other = torch.randn(1, 5)
    half = [4 * float(losses.pearson_distance((x / 2).softmax(1), other.softmax(1), dim=0).mean()) for x in logits]
    assert half == pytest.approx([4, 4])  # the half over classes, B = 1: a constant
    y = torch.randn(2, 5).requires_grad_()  # B = 2: a step
    losses.pearson_distance(y, torch.randn(2, 5), dim=0).sum().backward()
    assert float(y.grad.abs().max()) < 1e-4
    for C, most in ((5, 16), (2, 8)):
        p = 50 * torch.eye(C).repeat(4, 1)
        worst = float(losses.soft_label_loss(p, -p))
        assert 0.75 * most < worst <= most
    f = torch.nn.functional.normalize(torch.randn(64, 3))
    assert 0 < float(losses.feature_loss(f, -f)) < 4


def test_where_each_equation_stands():
    """The README's column and the course's table: each function exists, and speaks of its equation."""
    rows = re.findall(r"^\| \[(\w+)\.py\].*\| ([^|]+) \|$", README, re.MULTILINE)
    readme = [
        (f"{module}.{function}", n)
        for module, cell in rows
        for first, last, function in re.findall(r"(\d+)(?:-(\d+))? `([\w.]+)`", cell)
        for n in range(int(first), int(last or first) + 1)
    ]
    course = [(name, int(n)) for n, name in re.findall(r"^\| (\d+) \| .* \| `([\w.]+)` \|$", COURSE, re.MULTILINE)]
    for table in (readme, course):
        assert {n for _, n in table} == set(range(1, 26))
        wrong = [(name, n) for name, n in table if not find(name) or n not in says(find(name))]
        assert wrong == []


def says(function):
    return drawing.equations(inspect.getsource(function))


PAPERS = {f"{x:.2f}" for corpus in report.PAPER.values() for row in corpus.values() for x in row}
PAPERS |= {"0.89", "0.14"}  # MAGT over Concat: differences of the paper's rows
SETTINGS = {"0.01", "0.09", "0.08", "22.05", "3.11"}  # Table 1, AdamW's default, the released code, Python


@pytest.mark.parametrize(
    "name", [n for n in PAGES if n not in ("docs/gpu.md", "docs/anatomy.md", "docs/reliability.md")]
)
def test_no_result_is_typed_by_hand(name):
    """Scores have two decimals, deviations a ±, and losses and seconds are stored: outside of a block none stands."""
    typed = set(re.findall(r"(?<![\d.])\d+\.\d{2,}(?![\d.])|\S* ± \d\S*", prose(PAGES[name])))
    assert typed - PAPERS - SETTINGS == set()


def test_the_papers_differences():
    iemocap, meld = report.PAPER["IEMOCAP"], report.PAPER["MELD"]
    gaps = [corpus["MAGT T+A_KD+V"][1] - corpus["Concat T+A_KD+V"][1] for corpus in (iemocap, meld)]
    assert [f"{gap:.2f}" for gap in gaps] == ["0.89", "0.14"]


MADE_UP = ("demo", "ablation", "bootstrap", "presets", "sweep", "causal", "weights", "speed-stage1", "course")


@pytest.mark.parametrize("name", PAGES)
def test_made_up_data_is_called_so(name):
    """Each section that shows a result of the demo says that it is made up."""
    marked = docs.BLOCK.sub(lambda m: f"@{m[2]}@", PAGES[name])
    silent = []
    for section in re.split(r"^## ", marked, flags=re.MULTILINE):
        shown = [x for x in re.findall(r"@([\w-]+)@", section) if x.startswith(MADE_UP)]
        silent += [section.splitlines()[0]] * bool(shown and not re.search(r"made(-|\s)up", section, re.IGNORECASE))
    assert silent == []


def test_the_conversation_of_the_page_is_the_one_that_was_measured():
    (typed,) = re.findall(r"<<'END'\n(.*?)END\n", PAGES["docs/experiments.md"], re.DOTALL)
    assert typed == gather.CONVERSATIONS["demo"]


def test_the_stored_losses_are_those_of_the_code():
    stored, measured = json.loads((FIGURES / "losses.json").read_text())["rows"], gather.measure_losses()["rows"]
    assert stored == [pytest.approx(row, rel=1e-3) for row in measured]
