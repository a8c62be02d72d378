"""The drawings of docs/: they name only what there is, and are as their script makes them."""

import importlib
import inspect
import re
from xml.etree import ElementTree

import pytest

from extras.drawing import DOCS, DRAWINGS, MODULES, equations

SVG = "{http://www.w3.org/2000/svg}"


def lines(name):
    return [x.text for x in ElementTree.parse(DOCS / name).iter(f"{SVG}text")]


def find(path):
    """losses.soft_label_loss -> the function."""
    module, *names = path.split(".")
    found = importlib.import_module(module)
    for name in names:
        found = getattr(found, name)
    return found


def test_equations_are_read_from_a_text():
    assert equations("Eq. 6-8, 24 and 25; Eq. 3 (see 7)") == {3, 6, 7, 8, 24, 25} and not equations("in 1997, Table 3")


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_file_is_what_the_script_makes(name):
    assert (DOCS / name).read_text(encoding="utf-8") == DRAWINGS[name]().svg()


@pytest.mark.parametrize("name", DRAWINGS)
def test_each_function_exists_and_names_the_equations_beside_it(name):
    checked = 0
    for line in lines(name):
        for path in re.findall(rf"\b(?:{'|'.join(MODULES)})\.[\w.]+", line.replace("features.safetensors", "")):
            missing = equations(line) - equations(inspect.getsource(find(path)))
            assert not missing, f"{path} does not name Eq. {missing}"
            checked += 1
    assert checked > 5


def test_every_equation_of_the_paper_is_drawn():
    drawn = {number for name in DRAWINGS for line in lines(name) for number in equations(line)}
    assert drawn == set(range(1, 26)) - {6}  # Eq. 6 is a part of Eq. 9


@pytest.mark.parametrize("name", DRAWINGS)
def test_it_can_be_read_on_a_dark_page_and_in_black_and_white(name):
    root = ElementTree.parse(DOCS / name).getroot()
    card = next(root.iter(f"{SVG}rect"))
    assert card.get("fill") == "white" and [card.get(k) for k in ("width", "height")] == root.get("viewBox").split()[2:]
    colours = {x.get(k) for x in root.iter() for k in ("fill", "stroke")} - {None, "none"}
    greys = {c for c in colours if re.fullmatch(r"#(..)\1\1", c)}
    assert colours - greys == {"white", "black"}
    assert {x.get("fill") for x in root.iter(f"{SVG}text")} == {"black"}


@pytest.mark.parametrize("name", DRAWINGS)
def test_lines_stay_in_their_boxes(name):
    """A wide sans letter takes 0.56 of its size, one in bold 0.6."""
    root = ElementTree.parse(DOCS / name).getroot()
    boxes = [
        tuple(float(r.get(k)) for k in ("x", "y", "width", "height")) for r in root.iter(f"{SVG}rect") if r.get("x")
    ]
    inside = 0
    for text in root.iter(f"{SVG}text"):
        x, y, size = (float(text.get(k)) for k in ("x", "y", "font-size"))
        if text.get("text-anchor") == "middle":
            width = len(" ".join(text.text.split())) * size * (0.6 if text.get("font-weight") else 0.56)
            around = [
                b for b in boxes if b[2] > 50 and b[2] < 900 and b[0] < x < b[0] + b[2] and b[1] < y < b[1] + b[3]
            ]
            inside += len(around)
            assert all(width <= b[2] for b in around), text.text
    assert inside > 10
