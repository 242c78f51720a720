"""What a refused layout is told to try instead: that it works, every time, and that it is near."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fms_parallel.errors import ConfigError, FmsError, LayoutError
from fms_parallel.fit import check_fit
from fms_parallel.layout import CP_METHODS, REST, ParallelLayout
from fms_parallel.nearest import check, nearest
from fms_parallel.schedules import SCHEDULES
from fms_parallel.shape import ModelShape

SHAPE = ModelShape(
    layers=6, width=48, heads=12, kv_heads=4, head_width=4, ffn_width=64, vocab=100, max_positions=32
)  # as in test_layout.py: tp may be 1, 2, 4, 12

parse = ParallelLayout.parse


def refused(act: Callable[[], object]) -> tuple[str, list[str]]:
    """(the rule's sentence, the layouts after it)."""
    with pytest.raises(FmsError) as caught:
        act()
    said = re.fullmatch(r"(?s)(.*) Near it, (?:these work|this works): (.*)\.", str(caught.value))
    assert said is not None, f"nothing near it is named: {caught.value}"
    return said[1], re.findall(r"'(.*?)'", said[2])


@pytest.mark.parametrize(
    ("text", "world", "near"),
    [
        ("tp=2", 4, ["fsdp=2,tp=2", "dp=2,tp=2", "tp=4"]),
        ("", 2, ["fsdp=2", "dp=2", "tp=2"]),
        ("fsdp=2,tp=2", 1, [""]),
        ("tp=2,sp", 1, [""]),
        ("fsdp,tp=4", 6, ["fsdp=2,tp=3", "fsdp=6"]),
        ("hsdp,tp=2", 3, ["fsdp=3"]),
        ("pp,microbatches=4", 1, [""]),
        ("dp=4,fsdp=4,tp=4", 2, ["tp=2", "fsdp=2", "dp=2"]),
        (
            "pp=3,tp=2,microbatches=8,schedule=zbv",
            8,
            ["pp=4,tp=2,schedule=zbv,microbatches=8", "fsdp=4,tp=2", "dp=4,tp=2"],
        ),
        ("pp=8,fsdp=16,tp=8,sp", 1000, ["pp=5,fsdp=25,tp=8,sp", "pp=8,fsdp=25,tp=5,sp", "fsdp=125,tp=8,sp"]),
    ],
)
def test_a_world_that_does_not_fit_is_told_degrees_that_do(text: str, world: int, near: list[str]) -> None:
    assert refused(lambda: parse(text).resolve(world))[1] == near
    for other in near:
        assert parse(other).resolve(world).world_size == world


def test_degrees_for_a_world_fit_the_model_when_it_is_known() -> None:
    unknown = refused(lambda: parse("pp=2,tp=4").resolve(10))[1]
    known = refused(lambda: parse("pp=2,tp=4").resolve(10, shape=SHAPE))[1]
    assert "pp=2,tp=5" in unknown and len(known) == 3
    for other in known:
        check_fit(parse(other), SHAPE)


TIED = replace(SHAPE, tied=True)


@pytest.mark.parametrize(
    ("text", "shape", "rule", "near"),
    [
        ("tp=5", SHAPE, "12 heads", ["fsdp=5", "dp=5", "pp=5"]),
        ("tp=3,sp,fsdp=2", SHAPE, "4 kv heads", ["fsdp=3,tp=2,sp", "fsdp=6", "dp=3,fsdp=2"]),
        (
            "tp=4,sp",
            replace(SHAPE, ffn_width=3),
            "feed-forward width of 3",
            ["fsdp=2,tp=2,sp", "dp=2,tp=2,sp", "fsdp=4"],
        ),
        ("pp=7", SHAPE, "7 pipeline stages", ["fsdp=7", "dp=7", "cp=7"]),
        ("pp=4,schedule=looped_bfs", SHAPE, "8 pipeline stages", ["pp=4", "pp=2,fsdp=2,schedule=looped_bfs", ...]),
        ("pp=2,virtual_stages=4,schedule=looped_bfs", SHAPE, "8 pipeline stages", ["pp=2", ..., ...]),
        ("pp=3,microbatches=2", SHAPE, "cannot fill 3 stages", [..., "pp=3,microbatches=3", "fsdp=3"]),
        ("pp=2,schedule=interleaved1f1b,microbatches=5", SHAPE, "2 rounds", ["pp=2,microbatches=5", ..., "fsdp=2"]),
        ("pp=2,schedule=zbv,virtual_stages=3", SHAPE, "exactly 2 stages", ["pp=2", ..., "fsdp=2"]),
        ("pp=2,schedule=zbv,recompute=selective", SHAPE, "twice", ["pp=2,schedule=zbv,recompute=full", ..., ...]),
        ("pp=2,stage_split=3,4", SHAPE, "adds up to 7", ["pp=2", "pp=2,stage_split=2,4", "fsdp=2"]),
        ("cp=8,cp_method=ulysses", SHAPE, "do not divide by 8", ["cp=8", "fsdp=2,cp=4,cp_method=ulysses", ...]),
        ("cp=2,tp=4,cp_method=ulysses", SHAPE, "3 of 12 heads", ["cp=2,tp=4", ..., ...]),
        ("pp=2,dp=2,schedule=zbv", TIED, "embedding and head", ["pp=2,dp=2", "dp=4", "dp=2,fsdp=2"]),
        ("pp=2,cp=2,schedule=dualpipev,microbatches=4", TIED, "on one rank", ["pp=2,cp=2,microbatches=4", ..., ...]),
        ("pp=2,dp=2,schedule=file:/no/such.csv", SHAPE, "cannot be read", ["pp=2,dp=2", "dp=4", "dp=2,fsdp=2"]),
    ],
)
def test_a_model_that_cannot_be_cut_is_told_layouts_that_cut_it(
    text: str, shape: ModelShape, rule: str, near: list[Any]
) -> None:
    layout = parse(text)
    sentence, said = refused(lambda: layout.validate(shape))
    assert rule in sentence
    assert len(said) == len(near) and all(want in (..., found) for want, found in zip(near, said, strict=True)), said
    for other in said:
        check_fit(parse(other), shape)
        assert parse(other).world_size == layout.world_size


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("sp", ["tp=2,sp", ""]),
        ("fsdp,sp", ["fsdp,tp=2,sp", "fsdp"]),
        ("fsdp=2,sp", ["fsdp=2,tp=2,sp", "fsdp=2"]),
        ("microbatches=4", ["pp=2,microbatches=4", ""]),
        ("fsdp=2,schedule=gpipe", ["pp=2,fsdp=2,schedule=gpipe", "fsdp=2"]),
        ("stage_split=3,3", ["pp=2,stage_split=3,3", ""]),
        ("fsdp=2,loss_parallel=off", ["fsdp=2,tp=2,loss_parallel=off", "fsdp=2"]),
        ("cp_method=ulysses", ["cp=2,cp_method=ulysses", ""]),
        ("tp=2,tp_parts=attention", ["tp=2,sp,tp_parts=attention", "tp=2"]),
        ("pp=2,stage_split=1,2,3", ["pp=2", "pp=3,stage_split=1,2,3"]),
        ("fsdp,tp", ["fsdp=2,tp", "fsdp,tp=2"]),
        ("tp,hsdp", ["tp=2,hsdp", "tp"]),
        ("hsdp,fsdp=2", ["hsdp", "fsdp=2"]),
    ],
)
def test_words_that_do_not_go_together_are_told_words_that_do(text: str, near: list[str]) -> None:
    assert refused(lambda: parse(text))[1] == near
    assert all(str(parse(other)) == other for other in near)


def test_every_rule_that_is_given_holds_for_what_is_named() -> None:
    """Such as a batch that the replicas must divide; the error keeps its kind."""

    def divides(layout: ParallelLayout) -> None:
        if 6 % layout.data_parallel:
            raise ConfigError(f"6 rows do not divide over {layout.data_parallel}.")

    layout = parse("fsdp=4")
    with pytest.raises(ConfigError, match=r"do not divide over 4\. Near it") as caught:
        check(layout, divides)
    said = re.findall(r"'(.*?)'", str(caught.value))
    assert said == ["fsdp=2,tp=2", "tp=4", "pp=2,fsdp=2"]
    for other in said:
        divides(parse(other))


def test_nothing_is_named_when_nothing_works() -> None:
    def never(_: ParallelLayout) -> None:
        raise LayoutError("no.")

    with pytest.raises(LayoutError, match=r"^no\.$"):
        check(parse("pp=2,tp=2,sp"), never)


def test_a_search_stays_short_in_a_world_with_many_divisors() -> None:
    """Rules are asked some thousand times at most, however many factorisations there are."""
    asked: list[ParallelLayout] = []

    def never(layout: ParallelLayout) -> None:
        asked.append(layout)
        raise LayoutError("no.")

    assert nearest(parse("pp=2,tp=7,sp,microbatches=3"), [never], 720720) == []
    assert 100 < len(asked) < 4000


# ---- any layout, any model --------------------------------------------------------------------------------------


@st.composite
def wishes(draw: st.DrawFn) -> tuple[ParallelLayout, ModelShape, int]:
    """A layout that words allow, a model, and a number of ranks; what fits what is chance."""
    degrees: dict[str, Any] = {
        axis: draw(st.sampled_from((1, 1, 2, 3, 4, 8))) for axis in ("pp", "dp", "fsdp", "cp", "tp")
    }
    if draw(st.booleans()):
        degrees[draw(st.sampled_from(sorted(degrees)))] = REST
    words: dict[str, Any] = {"recompute": draw(st.sampled_from(("none", "full", "selective", "every=2")))}
    if degrees["tp"] != 1:
        words |= {"sp": draw(st.booleans()), "loss_parallel": draw(st.booleans())}
    if degrees["cp"] != 1:
        words["cp_method"] = draw(st.sampled_from(CP_METHODS))
    if degrees["pp"] != 1:
        words |= {
            "schedule": draw(st.sampled_from(sorted(SCHEDULES))),
            "microbatches": draw(st.integers(1, 12)),
            "virtual_stages": draw(st.integers(1, 3)),
        }
    kv_heads = draw(st.integers(1, 6))
    shape = replace(
        SHAPE,
        layers=draw(st.integers(1, 12)),
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 4)),
        ffn_width=draw(st.integers(1, 9)),
        tied=draw(st.booleans()),
    )
    return ParallelLayout(**degrees, **words), shape, draw(st.integers(1, 24))


@settings(derandomize=True, max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(wishes())
def test_every_layout_that_a_refusal_names_works(wish: tuple[ParallelLayout, ModelShape, int]) -> None:
    layout, shape, world = wish
    try:
        layout = layout.resolve(world, shape=shape)
    except LayoutError:
        said = refused(lambda: layout.resolve(world, shape=shape))[1]
    else:
        try:
            check_fit(layout, shape)
        except LayoutError:
            said = refused(lambda: layout.validate(shape))[1]
        else:
            layout.validate(shape)
            return
    assert 1 <= len(said) <= 3 and len(set(said)) == len(said)
    for text in said:
        check_fit(parse(text).resolve(world), shape)
