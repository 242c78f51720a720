"""Tokenizers: every text comes back as it was, and no text turns into a special token."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fms_parallel.errors import DataError
from fms_parallel.tokenizers import CharTokenizer, Tokenizer, check_vocab, get_tokenizer, train_sentencepiece

ROOT = Path(__file__).resolve().parents[1]
CODE = "def f(x, *, y=0):\n    if x:\n\treturn [x ** 2  for _ in range(10)]\r\n    return None  # 3.14\n" * 20

TRICKY = [
    "",
    " ",
    "  leading and trailing  ",
    "a  b   c    d",
    "\n",
    "\n\n\t\n    \t x",
    "line\r\nline\rline\n",
    "\x00\x01\x02\x03\x1f\x7f",
    "naïve café, e\u0301 vs é, ﬁ ligature, Ⅷ, ½",
    "漢字かな交じり文 العربية עברית",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "\u2028\u2029\u00a0\u200b\ufeff\u3000",
    "\u2581 the mark\u2581of\u2581\u2581spaces \u2581",
    "\U0010ffff\ud7ff\ue000",
    "<s></s><unk><pad><0x0A><0xE2><|endoftext|>",
    CODE,
]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece([CODE, "hello world"], 330, tmp_path_factory.mktemp("sp") / "tokenizer.model")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE whose file asks for everything a caller must not get: added tokens, truncation, padding."""
    hf = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    model = hf.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([CODE], trainer)
    model.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    model.enable_truncation(4)
    model.enable_padding(length=8)
    folder = tmp_path_factory.mktemp("hf")
    model.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "hello", "eos_token": "</s>"}))
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "pad_token": None, "model_max_length": 4}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["char", "sentencepiece_file", "hf_folder"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    name = request.param
    return get_tokenizer(name if name == "char" else request.getfixturevalue(name))


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_roundtrip_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_roundtrip_of_random_text_gives_it_back(tokenizer: Tokenizer) -> None:
    letters = [*" \t\n\r\x02\x03\u2581abé漢🙂<s>0/", "    ", "<s>", "</s>", "def ", "\u0301"]
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices(letters, k=draw.randrange(40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_no_text_turns_into_a_special_id(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids & set(ids)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_bos_and_eos_stand_around_the_same_ids_and_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(CODE, bos=True, eos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode(CODE), tokenizer.eos_id]
    assert tokenizer.decode(ids) == CODE


def test_special_ids_hold_bos_eos_and_pad(tokenizer: Tokenizer) -> None:
    named = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} - {None}
    assert len(named) >= 2 and named <= tokenizer.special_ids


def test_unknown_ids_decode_to_a_visible_mark(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), tokenizer.vocab_size, *tokenizer.encode("b"), -1]
    assert tokenizer.decode(ids) == "a\ufffdb\ufffd"


def test_lone_surrogate_is_read_as_a_question_mark(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800é")) == "a?é"


def test_fingerprint_is_kept_by_a_reload_and_differs_between_models(sentencepiece_file: Path, tmp_path: Path) -> None:
    other = train_sentencepiece([CODE], 310, tmp_path / "other.model")
    prints = [get_tokenizer(file).fingerprint for file in (sentencepiece_file, sentencepiece_file, other)]
    assert prints[0] == prints[1] != prints[2]


def test_char_ids_are_the_bytes_of_utf8_but_for_its_own_specials() -> None:
    tokenizer = CharTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (256, 2, 3)
    assert tokenizer.encode("aé\n") == [*"aé\n".encode()]


def test_hf_takes_specials_from_the_config_before_the_map(hf_folder: Path) -> None:
    tokenizer = get_tokenizer(hf_folder / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)


def test_hf_without_config_files_has_no_bos_and_says_so(hf_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes((hf_folder / "tokenizer.json").read_bytes())
    tokenizer = get_tokenizer(file)
    assert tokenizer.special_ids == {0, 1}
    with pytest.raises(DataError, match="no bos token"):
        tokenizer.encode("x", bos=True)


def test_hf_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"fms_parallel\[hf\]"):
        get_tokenizer(tmp_path)


# ---- training sentencepiece ---------------------------------------------------------------------------------------


def test_training_takes_texts_and_files_alike(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8", newline="")
    models = [
        train_sentencepiece(sources, 320, tmp_path / "t.model").read_bytes()
        for sources in ([CODE], [tmp_path / "code.py"], CODE, iter([CODE]))
    ]
    assert models[0] == models[1] == models[2] == models[3]


def test_training_gives_runs_of_spaces_one_piece_and_the_asked_size(sentencepiece_file: Path) -> None:
    tokenizer = get_tokenizer(sentencepiece_file)
    assert tokenizer.vocab_size == 330
    assert len(tokenizer.encode("    ")) == 1


def test_training_leaves_only_the_model(sentencepiece_file: Path) -> None:
    assert list(sentencepiece_file.parent.iterdir()) == [sentencepiece_file]


def test_training_reads_lines_of_any_length(tmp_path: Path) -> None:
    model = train_sentencepiece(["abc " * 30_000], 270, tmp_path / "t.model")
    assert len(get_tokenizer(model).encode("abc")) == 1


def _broken_source() -> Any:
    yield "some text"
    raise DataError("line 7 is broken")


@pytest.mark.parametrize(
    ("sources", "size", "message"),
    [
        (lambda: [], 300, "no text"),
        (lambda: ["", "\n\n"], 300, "no text"),
        (lambda: ["hello world"], 100, "vocab_size=100.*smaller than required"),
        (lambda: ["hello world"], 5000, "vocab_size=5000.*too high"),
        (lambda: [Path("nowhere.txt")], 300, r"nowhere\.txt"),
        (_broken_source, 300, "^line 7 is broken$"),
    ],
)
def test_training_refuses(tmp_path: Path, sources: Callable[[], Any], size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece(sources(), size, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_foreign_model_that_normalises_keeps_what_it_can(tmp_path: Path) -> None:
    """A model with sentencepiece's own defaults: no bytes, a space put first, no pad."""
    from sentencepiece import SentencePieceTrainer

    with open(tmp_path / "foreign.bin", "wb") as out:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["hello world"] * 9),
            model_writer=out,
            vocab_size=20,
            model_type="bpe",
            minloglevel=2,
        )
    tokenizer = get_tokenizer(tmp_path / "foreign.bin", style="sentencepiece")
    assert tokenizer.pad_id is None
    assert tokenizer.decode(tokenizer.encode("hello\u2581world", bos=True)) == "hello world"


# ---- by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["char", "char_tokenizer"])
def test_char_is_known_by_both_words(name: str) -> None:
    assert isinstance(get_tokenizer(name), CharTokenizer)


def test_folder_with_only_a_sentencepiece_model_is_understood(sentencepiece_file: Path) -> None:
    assert get_tokenizer(sentencepiece_file.parent).vocab_size == 330


def test_unknown_word_and_missing_file_list_what_is_understood() -> None:
    with pytest.raises(DataError, match=r"'chr'.*'char'.*\.model.*tokenizer\.json"):
        get_tokenizer("chr")


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot tell"):
        get_tokenizer(tmp_path)


def test_unknown_style_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean 'sentencepiece'"):
        get_tokenizer("x", style="sentencpiece")


@pytest.mark.parametrize(("name", "style"), [("t.model", None), ("t.json", "hf")])
def test_broken_file_is_refused_by_name(tmp_path: Path, name: str, style: str | None) -> None:
    if style == "hf":
        pytest.importorskip("tokenizers")
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(DataError, match=name):
        get_tokenizer(tmp_path / name, style=style)


def test_check_vocab_refuses_only_a_tokenizer_larger_than_the_model() -> None:
    check_vocab(CharTokenizer(), 256)
    check_vocab(CharTokenizer(), 300)
    with pytest.raises(DataError, match=r"256 tokens.*vocabulary is 255"):
        check_vocab(CharTokenizer(), 255)


def test_importing_tokenizers_and_data_loads_nothing_optional() -> None:
    code = (
        "import sys, fms_parallel.tokenizers; assert 'torch' not in sys.modules\n"
        "import fms_parallel.data\n"
        "print([name for name in ('pyarrow', 'tokenizers', 'sentencepiece', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
