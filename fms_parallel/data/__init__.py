"""Datasets, and the order in which a run reads them.

tokenizer = get_tokenizer("char")
dataset = get_dataset("stdlib", tokenizer, seq_len=256, cache_dir="cache")
feed = Feed(dataset, global_batch=16, seed=0, shard=(rank, ranks))
batch = feed.batch(step)        # input_ids [b, S], labels [b, S], the same for every layout
"""

from fms_parallel.data.corpus import Corpus
from fms_parallel.data.feed import Batch, Feed
from fms_parallel.data.instruction import format_prompt
from fms_parallel.data.registry import get_corpus, get_dataset, list_datasets, register_dataset
from fms_parallel.data.rows import IGNORE, RandomRows, RowDataset, RowView, train_validation_split
from fms_parallel.tokenizers import check_vocab

__all__ = [
    "IGNORE",
    "Batch",
    "Corpus",
    "Feed",
    "RandomRows",
    "RowDataset",
    "RowView",
    "check_vocab",
    "format_prompt",
    "get_corpus",
    "get_dataset",
    "list_datasets",
    "register_dataset",
    "train_validation_split",
]
