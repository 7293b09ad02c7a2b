"""Configurations refuse what is wrong by its path, take dotted overrides, and survive JSON."""

from typing import Annotated, Any

import pytest
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from osmose.configuration import Config, ConfigError, Registry, override, read_override
from osmose.errors import UserError, nearest


class Shape(Config):
    kind: str


class Square(Shape):
    kind: str = "square"
    side: int = Field(2, ge=1)


class Disc(Shape):
    kind: str = "disc"
    radius: float = 1.0

    @model_validator(mode="after")
    def _small(self) -> "Disc":
        if self.radius > 10:
            raise ValueError("the radius is more than 10")
        return self


SHAPES = Registry("shape", {"square": (f"{__name__}:Square", "a square"), "disc": (f"{__name__}:Disc", "a disc")})
AnyShape = Annotated[SerializeAsAny[Shape], BeforeValidator(SHAPES.parse)]


class Inner(Config):
    shape: AnyShape = Square()
    numbers: tuple[int, ...] = (1, 2)


class Outer(Config):
    inner: Inner = Inner()
    shape: AnyShape = Disc()
    name: str
    share: float = 0.5


def refusal(values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Outer.parse(values)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name: required, but not given"),
        ({"name": 3}, "name: 3 is not valid: should be a valid string"),
        ({"name": "a", "shar": 1}, "shar: unknown field; did you mean 'share'? (one of inner, name, shape, share)"),
        ({"name": "a", "share": float("nan")}, "share: nan is not valid: should be a finite number"),
        (
            {"name": "a", "inner": {"numbrs": 1}},
            "inner.numbrs: unknown field; did you mean 'numbers'? (one of numbers, shape)",
        ),
        (
            {"name": "a", "inner": {"numbers": [1, "x"]}},
            "inner.numbers.1: 'x' is not valid: should be a valid integer, ",
        ),
        ({"name": "a", "inner": 3}, "inner: 3 is not valid: should be a valid dictionary"),
        # The path goes through parts that come in several kinds, however deep they lie.
        (
            {"name": "a", "shape": "dics"},
            "shape.kind: unknown shape 'dics'; did you mean 'disc'? (one of disc, square)",
        ),
        ({"name": "a", "shape": {"side": 3}}, "shape.kind: missing; choose one of disc, square"),
        ({"name": "a", "shape": None}, "shape.kind: missing; choose one of disc, square"),
        (
            {"name": "a", "inner": {"shape": {"kind": "square", "side": 0}}},
            "inner.shape.side: 0 is not valid: should be gre",
        ),
        (
            {"name": "a", "inner": {"shape": {"kind": "disc", "side": 1}}},
            "inner.shape.side: unknown field; choose one of",
        ),
        (
            {"name": "a", "inner": {"shape": {"kind": "disc", "radius": 11}}},
            "inner.shape: the radius is more than 10",
        ),
    ],
)
def test_refusals_name_path_value_and_what_would_do(values, message):
    assert refusal(values).startswith(message)


def test_long_values_are_cut_short():
    assert len(refusal({"name": ["x" * 500]})) < 120


def test_configurations_survive_json_and_cannot_be_changed():
    config = Outer.parse({"name": "a", "inner": {"shape": {"kind": "disc", "radius": 3}, "numbers": [4]}})
    assert config.inner.shape == Disc(radius=3.0)
    assert Outer.parse(config.to_json()) == config
    with pytest.raises(ValueError, match="frozen"):
        config.name = "b"


def test_replace_reaches_into_parts_and_validates():
    config = Outer.parse({"name": "a"})
    changed = config.replace(**{"inner.shape.side": 5, "shape": "square", "share": 0.25})
    assert (changed.inner.shape.side, changed.shape, changed.share) == (5, Square(), 0.25)
    assert config.inner.shape.side == 2
    with pytest.raises(ConfigError, match=r"^inner\.shape\.side: 0 is not valid"):
        config.replace(**{"inner.shape.side": 0})


def test_override_of_a_kind_starts_from_its_defaults():
    values = {"shape": {"kind": "disc", "radius": 3.0}, "share": 0.5}
    assert override(values, {"shape.kind": "square"}) == {"shape": {"kind": "square"}, "share": 0.5}
    assert override(values, {"shape": "square", "shape.side": 4})["shape"] == {"kind": "square", "side": 4}
    assert override(values, {"shape.kind": "disc"}) == values
    assert override(values, {"more.deep": 1})["more"] == {"deep": 1}
    assert values == {"shape": {"kind": "disc", "radius": 3.0}, "share": 0.5}
    with pytest.raises(ConfigError, match=r"^share\.deep: share is a plain value"):
        override(values, {"share.deep": 1})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=3", ("a.b", 3)),
        ("a=1.5e-3", ("a", 0.0015)),
        ("a=true", ("a", True)),
        ("a=null", ("a", None)),
        ("a=[1,2]", ("a", [1, 2])),
        ("a=1,2,2", ("a", [1, 2, 2])),
        ("a=4,", ("a", [4])),
        ("a=1,x", ("a", [1, "x"])),
        ("a=cosine", ("a", "cosine")),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
    ],
)
def test_overrides_are_json_a_list_or_a_word(text, expected):
    assert read_override(text) == expected


@pytest.mark.parametrize("text", ["a", "=3", "a..b=3", ".a=3", "a-b=3", "1a=3", ""])
def test_what_is_no_override_is_refused(text):
    with pytest.raises(UserError, match=r"path\.to\.field=value"):
        read_override(text)


def test_registries_name_the_nearest_kind_and_take_objects():
    assert SHAPES.resolve("disc") is Disc
    assert SHAPES.parse(Square(side=3)) == Square(side=3)
    with pytest.raises(UserError, match="unknown shape 'sqare'; did you mean 'square'"):
        SHAPES.resolve("sqare")


FIGURES = Registry(
    "figure",
    {"square": (f"{__name__}:Square", "a square"), "disc": (f"{__name__}:Disc", "a disc")},
    {"coin": ({"kind": "disc", "radius": 0.5}, "a small disc"), "unit": ({"kind": "square", "side": 1}, "one by one")},
)


class Drawing(Config):
    figure: Annotated[SerializeAsAny[Shape], BeforeValidator(FIGURES.parse)] = Disc()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("coin", Disc(radius=0.5)),
        ({"kind": "coin"}, Disc(radius=0.5)),
        ({"kind": "coin", "radius": 2}, Disc(radius=2.0)),
        ("unit", Square(side=1)),
        ("disc", Disc()),
        (Square(side=7), Square(side=7)),
    ],
)
def test_a_preset_is_as_good_as_a_kind(given, expected):
    drawing = Drawing.parse({"figure": given})
    assert drawing.figure == expected
    assert drawing.to_json()["figure"]["kind"] in FIGURES.entries
    assert Drawing.parse(drawing.to_json()) == drawing


def test_overrides_choose_presets_first_and_their_fields_after():
    drawing = Drawing.parse({"figure": {"kind": "disc", "radius": 3}})
    for chosen in ({"figure": "coin"}, {"figure.kind": "coin"}):
        assert drawing.replace(**chosen).figure == Disc(radius=0.5)  # not the radius that was there
        for changes in ({**chosen, "figure.radius": 4}, {"figure.radius": 4, **chosen}):
            assert drawing.replace(**changes).figure == Disc(radius=4.0)
    assert drawing.replace(figure="unit").figure == Square(side=1)
    assert drawing.replace(figure={"kind": "coin", "radius": 5}).figure == Disc(radius=5.0)
    assert override({}, {"figure": "coin", "figure.radius": 4}) == {"figure": {"kind": "coin", "radius": 4}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("coyn", "figure.kind: unknown figure 'coyn'; did you mean 'coin'? (one of coin, disc, square, unit)"),
        ({"radius": 1}, "figure.kind: missing; choose one of coin, disc, square, unit"),
        ({"kind": "coin", "side": 1}, "figure.side: unknown field; choose one of kind, radius"),
        ({"kind": "coin", "radius": "x"}, "figure.radius: 'x' is not valid: should be a valid number"),
        ({"kind": "coin", "radius": 11}, "figure: the radius is more than 10"),
    ],
)
def test_presets_are_refused_like_kinds(given, message):
    with pytest.raises(ConfigError) as caught:
        Drawing.parse({"figure": given})
    assert str(caught.value).startswith(message)


def test_presets_are_among_the_choices():
    assert FIGURES.choices == {"square": "a square", "disc": "a disc", "coin": "a small disc", "unit": "one by one"}
    assert SHAPES.choices == {"square": "a square", "disc": "a disc"}


def test_nearest():
    assert nearest("abd", ["abc", "xyz"]) == "did you mean 'abc'? (one of abc, xyz)"
    assert nearest("q", ["b", "a"]) == "choose one of a, b"
