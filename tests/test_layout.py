"""`ParallelLayout`: what people type, what they get, and the sentence they read when it cannot be."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from math import prod
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fms_parallel.errors import LayoutError
from fms_parallel.fit import check_fit
from fms_parallel.layout import (
    AXES,
    CP_METHODS,
    NOT_YET,
    OFFLOADS,
    PRECISIONS,
    RECOMPUTE,
    REST,
    SCHEDULES,
    TP_PARTS,
    ParallelLayout,
)
from fms_parallel.schedules import least_stages_per_rank
from fms_parallel.shape import ModelShape

SHAPE = ModelShape(
    layers=6, width=48, heads=12, kv_heads=4, head_width=4, ffn_width=64, vocab=100, max_positions=32
)  # kv heads are split over tp 2 and 4, copied for 12; 3 and 6 divide the heads but not the kv heads

parse = ParallelLayout.parse

same_every_time = settings(derandomize=True, max_examples=100, deadline=None)


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    """Any valid layout: each word that its degrees allow, set or not."""
    open_word = draw(st.sampled_from([None, None, "hsdp", *AXES]))
    degrees: dict[str, Any] = {axis: draw(st.integers(1, 9)) for axis in AXES}
    if open_word == "hsdp":
        degrees |= {"dp": 1, "fsdp": 1}
    elif open_word:
        degrees[open_word] = REST
    words: dict[str, Any] = {
        "loss_parallel": degrees["tp"] == 1 or draw(st.booleans()),
        "precision": draw(st.sampled_from(PRECISIONS)),
        "offload": draw(st.sampled_from(OFFLOADS)),
        "recompute": draw(
            st.sampled_from(RECOMPUTE)
            | st.integers(1, 99).map("every={}".format)
            | st.integers(0, 99).map("budget=0.{:02}".format)
        ),
        "sp": degrees["tp"] != 1 and draw(st.booleans()),
        "hsdp": open_word == "hsdp",
    }
    words["tp_parts"] = draw(st.sampled_from(TP_PARTS)) if words["sp"] else "all"
    if degrees["cp"] != 1:
        words["cp_method"] = draw(st.sampled_from(CP_METHODS))
    if degrees["pp"] != 1:
        words |= draw(pipelines(degrees["pp"]))
    return ParallelLayout(**degrees, **words)


@st.composite
def pipelines(draw: st.DrawFn, pp: int) -> dict[str, Any]:
    """The words of a pipeline of `pp` ranks."""
    virtual, schedule = draw(st.integers(1, 3)), draw(st.sampled_from([*sorted(SCHEDULES), "file:my step.csv"]))
    stages = pp * max(virtual, least_stages_per_rank(schedule)) if pp != REST else draw(st.integers(1, 5))
    split = st.lists(st.integers(1, 50), min_size=stages, max_size=stages).map(tuple)
    return {
        "schedule": schedule,
        "microbatches": draw(st.integers(1, 64)),
        "virtual_stages": virtual,
        "stage_split": draw(st.none() | split),
    }


@same_every_time
@given(layouts())
def test_text_and_json_of_any_layout_parse_back_to_it(layout: ParallelLayout) -> None:
    assert parse(str(layout)) == layout
    assert ParallelLayout.from_json(layout.to_json()) == layout
    assert ParallelLayout.from_json(json.loads(layout.to_json())) == layout
    assert hash(parse(str(layout))) == hash(layout)


@same_every_time
@given(layouts())
def test_text_says_nothing_that_is_the_default(layout: ParallelLayout) -> None:
    words = {word.partition("=")[0] for word in str(layout).split(",") if not word.isdecimal()} - {""}
    assert words == {f.name for f in fields(layout) if getattr(layout, f.name) != f.default}


@same_every_time
@given(layouts())
def test_a_resolved_layout_fits_exactly_its_own_world(layout: ParallelLayout) -> None:
    if not layout.resolved:
        assume(layout.pp != REST or layout.stage_split is None)  # the split would say how many ranks
        layout = layout.resolve(6 * prod(degree or 1 for degree in layout.degrees))
    assert layout.resolved
    assert layout.resolve(layout.world_size) is layout
    with pytest.raises(
        LayoutError, match=f"needs {layout.world_size} ranks .* but the job has {layout.world_size + 1}:"
    ):
        layout.resolve(layout.world_size + 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("  ", {}),
        ("pp=2,fsdp=2,tp=2,sp", {"pp": 2, "fsdp": 2, "tp": 2, "sp": True}),
        (" tp = 2 , sp ", {"tp": 2, "sp": True}),
        ("dp=3", {"dp": 3}),
        ("ddp=3", {"dp": 3}),
        ("cp=2,cp_method=ulysses", {"cp": 2, "cp_method": "ulysses"}),
        ("tp=2,loss_parallel=off", {"tp": 2, "loss_parallel": False}),
        ("tp=2,sp=on,loss_parallel=1", {"tp": 2, "sp": True}),
        ("tp=2,sp=false,loss_parallel=0", {"tp": 2, "loss_parallel": False}),
        ("tp=2,sp,tp_parts=attention", {"tp": 2, "sp": True, "tp_parts": "attention"}),
        ("pp=2,schedule=zbv,microbatches=8", {"pp": 2, "schedule": "zbv", "microbatches": 8}),
        ("pp=2,stage_split=7, 9,tp=2", {"pp": 2, "stage_split": (7, 9), "tp": 2}),
        ("pp=2,virtual_stages=2", {"pp": 2, "virtual_stages": 2}),
        ("precision=bf16,offload=params", {"precision": "bf16", "offload": "params"}),
        ("recompute=full", {"recompute": "full"}),
        ("recompute=every=3", {"recompute": "every=3"}),
        ("recompute=budget=0.25", {"recompute": "budget=0.25"}),
        ("pp=2,schedule=file:a b/x=1.csv,tp=2", {"pp": 2, "schedule": "file:a b/x=1.csv", "tp": 2}),
        ("tp", {"tp": REST}),
        ("ddp", {"dp": REST}),
        ("fsdp,tp=2", {"fsdp": REST, "tp": 2}),
        ("hsdp", {"hsdp": True}),
    ],
)
def test_every_word_is_read(text: str, expected: dict[str, Any]) -> None:
    assert parse(text) == ParallelLayout(**expected)


def test_nothing_and_a_layout_are_read_as_they_are() -> None:
    layout = ParallelLayout(tp=2)
    assert parse(layout) is layout
    assert parse(None) == ParallelLayout() and str(ParallelLayout()) == "" and ParallelLayout().world_size == 1
    with pytest.raises(FrozenInstanceError):
        layout.tp = 4  # type: ignore[misc]


def test_numbers_that_others_ask_for() -> None:
    layout = parse("pp=2,dp=3,fsdp=5,cp=7,tp=11")
    assert layout.degrees == (2, 3, 5, 7, 11)
    assert (layout.world_size, layout.data_parallel) == (2 * 3 * 5 * 7 * 11, 15)
    assert (layout.stages, layout.pieces) == (2, 2)  # one stage per rank, a micro-batch for each stage
    layout = parse("pp=2,schedule=zbv,microbatches=6")
    assert (layout.stages, layout.pieces) == (4, 6)  # two stages per rank make the v
    intervals = {"none": 0, "full": 1, "selective": 1, "every=1": 1, "every=4": 4, "budget=0.5": 0}
    assert {word: ParallelLayout(recompute=word).recompute_interval for word in intervals} == intervals
    assert {word: ParallelLayout(recompute=word).recompute_budget for word in ("full", "every=2", "budget=0.5")} == {
        **{"full": None, "every=2": None},
        "budget=0.5": 0.5,
    }


# ---- worlds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "world", "expected"),
    [
        ("tp", 4, "tp=4"),
        ("fsdp", 1, ""),
        ("ddp", 4, "dp=4"),
        ("fsdp,tp=2", 8, "fsdp=4,tp=2"),
        ("pp,microbatches=4", 2, "pp=2,microbatches=4"),
        ("cp,cp_method=ulysses", 2, "cp=2,cp_method=ulysses"),
        ("tp,sp", 4, "tp=4,sp"),
        ("tp,sp", 1, ""),  # sp was not asked for by number
        ("pp,stage_split=1,2", 2, "pp=2,stage_split=1,2"),
    ],
)
def test_a_bare_axis_takes_the_ranks_that_others_leave(text: str, world: int, expected: str) -> None:
    assert str(parse(text).resolve(world)) == expected


@pytest.mark.parametrize(
    ("text", "world", "per_node", "expected"),
    [
        ("hsdp", 16, 8, "dp=2,fsdp=8"),
        ("hsdp,tp=2,sp", 16, 8, "dp=2,fsdp=4,tp=2,sp"),
        ("hsdp,tp=8", 16, 8, "dp=2,tp=8"),  # tp fills a node: nothing is left to shard inside it
        ("hsdp,tp=8", 16, 4, "dp=2,tp=8"),  # tp is wider than a node: the same
        ("hsdp", 8, 8, "dp=2,fsdp=4"),
        ("hsdp", 8, None, "dp=2,fsdp=4"),
        ("hsdp", 3, None, "fsdp=3"),
        ("hsdp", 1, None, ""),
    ],
)
def test_bare_hsdp_shards_inside_a_node_and_copies_across(text: str, world: int, per_node: int, expected: str) -> None:
    assert str(parse(text).resolve(world, per_node)) == expected


@pytest.mark.parametrize(
    ("text", "world", "words"),
    [
        ("tp=2", 4, r"layout 'tp=2' needs 2 ranks \(tp=2\) but the job has 4: start it with --nproc_per_node=2"),
        ("fsdp=2,tp=2", 1, r"needs 4 ranks \(fsdp=2 \* tp=2\) but the job has 1: .*=4, or change a degree"),
        ("", 2, r"a layout without degrees needs 1 ranks \(every degree is 1\) but the job has 2"),
        ("fsdp,tp=4", 6, r"fsdp takes the rest, but 6 ranks do not divide by 4 \(tp=4\): start a multiple of 4 ranks"),
        ("fsdp,tp=4", 0, "0 ranks do not divide by 4"),
        ("hsdp,tp=2", 3, r"hsdp takes the rest, but 3 ranks do not divide by 2 \(tp=2\): start a multiple of 2"),
        ("pp,microbatches=4", 1, "microbatches=4 with pp=1"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(text: str, world: int, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        parse(text).resolve(world)


@pytest.mark.parametrize("text", ["tp", "fsdp,tp=2", "hsdp"])
def test_open_degrees_answer_nothing_before_they_are_resolved(text: str) -> None:
    layout = parse(text)
    assert not layout.resolved
    for ask in (lambda: layout.world_size, lambda: layout.data_parallel, lambda: layout.validate(SHAPE)):
        with pytest.raises(LayoutError, match=rf"^{text}: a degree is still open; call resolve\(world_size\) first"):
            ask()


# ---- sentences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tpp=2", r"unknown layout word 'tpp'. Did you mean 'tp'\? Known: .*cp, .*ddp, dp, fsdp, hsdp"),
        ("TP=2", r"unknown layout word 'TP'. Did you mean 'tp'\?"),
        ("None", "unknown layout word 'None'"),
        ("tp=2,3", "unknown layout word '3'"),
        ("tp=2,,sp", "'tp=2,,sp': an empty word between commas"),
        ("tp=2,tp=4", "'tp=2,tp=4': tp is given twice"),
        ("ddp,dp=2", "dp is given twice"),
        ("ep=2", "ep: expert parallelism is .* instead"),
        ("tp=0", "tp=0: needs a whole number >= 1, as in tp=2"),
        ("tp=-2", "tp=-2: needs a whole number >= 1"),
        ("tp=two", "tp=two: needs a whole number >= 1"),
        ("tp=²", "tp=²: needs a whole number >= 1"),
        ("tp=", "tp=: needs a whole number >= 1"),
        ("pp=2,microbatches", "microbatches=: needs a whole number >= 1, as in microbatches=2"),
        ("pp=2,virtual_stages=0", "virtual_stages=0: needs a whole number >= 1"),
        ("pp=2,stage_split", "stage_split=: needs a whole number"),
        ("pp=2,stage_split,3", "stage_split=: needs a whole number"),
        ("pp=2,stage_split=3,x", "unknown layout word 'x'"),
        ("tp=2,sp=maybe", "sp=maybe: is on or off; write sp or sp=off"),
        ("schedule", "schedule needs a value: one of gpipe, 1f1b, interleaved1f1b"),
        ("recompute=", "recompute needs a value: one of none, full, selective, every=N"),
        ("pp=2,schedule=1f1", r"unknown schedule '1f1'. Did you mean '1f1b'\? Known: 1f1b, .*zbv"),
        ("cp=2,cp_method=star", "unknown cp_method 'star'. Known: allgather, ring, ulysses"),
        ("precision=fp8", "unknown precision 'fp8'.* Known: bf16, fp32, fp64"),
        ("offload=disk", "unknown offload 'disk'.* Known: none, optimizer_state, optimizer_step, params"),
        ("recompute=all", "unknown recompute policy 'all'.* Known: budget=FRACTION, every=N, full, none, selective"),
        ("recompute=budget=1.5", r"recompute=budget=1.5: give the part to keep, 0 <= part < 1, as in budget=0.5"),
        ("recompute=budget=1", r"recompute=budget=1: give the part to keep"),
        ("recompute=budget=", r"recompute=budget=: give the part to keep"),
        ("pp=2,schedule=file:", r"schedule=file:: write file:PATH, where PATH holds no comma"),
        ("schedule=file:a.csv", r"schedule=file:a.csv with pp=1: it belongs to a pipeline"),
        ("recompute=every=0", "unknown recompute policy 'every=0'.* every=N"),
        ("recompute=every=²", "unknown recompute policy 'every=²'"),
        ("hsdp=2", "hsdp=2: write dp=REPLICAS,fsdp=SHARDS, or bare hsdp"),
        ("hsdp,fsdp=2", "hsdp,fsdp=2: hsdp already sets dp and fsdp; drop it or drop them"),
        ("dp=1,hsdp", "dp=1,hsdp: hsdp already sets dp and fsdp"),
        ("fsdp,tp", "fsdp,tp: only one word may take the ranks that others leave; give the others a number"),
        ("tp,hsdp", "tp,hsdp: only one word may take the ranks"),
        ("sp", "sp with tp=1: sequence parallelism shards tokens over tp; write tp=N,sp with N >= 2"),
        ("microbatches=4", "microbatches=4 with pp=1: it belongs to a pipeline; add pp=N or drop it"),
        ("schedule=gpipe", "schedule=gpipe with pp=1"),
        ("virtual_stages=2", "virtual_stages=2 with pp=1"),
        ("fsdp=2,loss_parallel=off", "loss_parallel=off with tp=1"),
        ("tp=2,tp_parts=attention", "tp_parts=attention without sp: .* write tp=N,sp,tp_parts=attention, or drop it"),
        ("tp=2,sp,tp_parts=attn", "unknown tp_parts 'attn'. Did you mean 'attention'"),
        ("stage_split=3,3", "stage_split=3,3 with pp=1: it belongs to a pipeline"),
        ("cp_method=ulysses", "cp_method=ulysses with cp=1: add cp=N or drop it"),
        ("pp=2,stage_split=1,2,3", "stage_split=1,2,3: pp=2 with virtual_stages=1 needs 2 numbers"),
        ("pp=2,virtual_stages=2,stage_split=1,2", "stage_split=1,2: pp=2 with virtual_stages=2 needs 4 numbers"),
    ],
)
def test_a_word_that_cannot_be_is_refused_with_the_way_out(text: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        parse(text)


def test_every_word_that_is_not_built_yet_says_what_to_do_instead() -> None:
    for word, reason in NOT_YET.items():
        with pytest.raises(LayoutError) as caught:
            parse(f"{word}=2")
        assert str(caught.value) == f"{word}: {reason}."
        assert "instead" in reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"tp": 2, "ttp": 1}', r"unknown layout field 'ttp'. Did you mean 'tp'\?"),
        ('{"tp": 2.5}', "tp=2.5: needs a whole number"),
        ('{"tp": -1}', "tp=-1: needs a whole number"),
        ('{"tp": true}', "tp=True: needs a whole number"),
        ('{"pp": 2, "microbatches": "4"}', "microbatches='4': needs a whole number"),
        ('{"pp": 2, "microbatches": 0}', "microbatches=0: needs a whole number"),
        ('{"tp": 2, "sp": "yes"}', "sp='yes': is on or off; give true or false"),
        ('{"recompute": null}', "unknown recompute policy 'None'"),
        ('{"schedule": null}', "unknown schedule 'None'"),
        ('{"pp": 2, "schedule": "file:a,b.csv"}', "schedule=file:a,b.csv: write file:PATH, where PATH holds no comma"),
        ('{"pp": 0, "stage_split": []}', r"stage_split=\(\): needs the blocks of each stage, each >= 1"),
        ('{"pp": 2, "stage_split": [3, 0]}', r"stage_split=\(3, 0\): needs the blocks of each stage"),
        ('{"pp": 2, "stage_split": "33"}', "stage_split='33': needs the blocks of each stage"),
        ('{"hsdp": true, "dp": 2}', "dp=2,hsdp: hsdp already sets dp and fsdp"),
        ('{"tp": ', r"is not JSON .*: to_json\(\) writes what this reads"),
        ("[1, 2]", "is not a JSON object"),
    ],
)
def test_json_that_is_no_layout_is_refused_with_the_way_out(text: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        ParallelLayout.from_json(text)


# ---- models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "tp=2", "tp=4", "tp=12", "pp=6", "pp=3,schedule=looped_bfs", "pp=2,stage_split=1,5"]
)
def test_a_model_that_can_be_cut_is_accepted(text: str) -> None:
    parse(text).validate(SHAPE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=5", r"tp=5 does not divide 12 heads: each rank holds whole heads. Use tp in \[1, 2, 4, 12\]"),
        ("tp=3", r"tp=3 with 4 kv heads: one must divide the other.* Use tp in \[1, 2, 4, 12\]"),
        ("pp=7", r"7 pipeline stages \(pp=7 \* virtual_stages=1\) for 6 blocks: .* at most 6 stages"),
        ("pp=4,schedule=looped_bfs", r"8 pipeline stages \(pp=4 \* virtual_stages=2\) for 6 blocks"),
        ("pp=2,schedule=zbv,recompute=selective", "goes through a block twice in its backward pass"),
        ("pp=3,microbatches=2", r"schedule=1f1b with pp=3: 2 micro-batches cannot fill 3 stages: use microbatches=3"),
        (
            "pp=2,stage_split=3,4",
            "stage_split=3,4 adds up to 7 blocks but the model has 6: change a number, or drop it",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_the_way_out(text: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        parse(text).validate(SHAPE)


@same_every_time
@given(st.integers(1, 48), st.integers(1, 12), st.integers(1, 64))
def test_the_degrees_that_a_refusal_names_are_those_that_work(group: int, kv_heads: int, tp: int) -> None:
    shape = replace(SHAPE, heads=group * kv_heads, kv_heads=kv_heads)
    works = []
    for degree in range(1, shape.heads + 1):
        try:
            check_fit(ParallelLayout(tp=degree), shape)
            works.append(degree)
        except LayoutError:
            pass
    try:
        check_fit(ParallelLayout(tp=tp), shape)
        assert tp in works
    except LayoutError as error:
        assert str(error).endswith(f"Use tp in {works}.")
