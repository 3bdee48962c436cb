"""From rows in files to batches of tokens."""

from mlx_qlora.dataset.batches import Batch, Batches, in_order
from mlx_qlora.dataset.records import Example, Record, read_conversations, read_records
from mlx_qlora.dataset.render import (
    DEFAULT_CHAT_TEMPLATE,
    ensure_chat_template,
    ensure_prompt_template,
    render,
    render_prompt,
    template_hash,
    template_of,
)
from mlx_qlora.dataset.report import DataReport, SplitReport
from mlx_qlora.dataset.splits import Dataset, load_dataset
from mlx_qlora.dataset.tokenizer_identity import tokenizer_sha256

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "Batch",
    "Batches",
    "DataReport",
    "Dataset",
    "Example",
    "Record",
    "SplitReport",
    "ensure_chat_template",
    "ensure_prompt_template",
    "in_order",
    "load_dataset",
    "read_conversations",
    "read_records",
    "render",
    "render_prompt",
    "template_hash",
    "template_of",
    "tokenizer_sha256",
]
