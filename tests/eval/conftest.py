"""A tiny random Llama, a tokenizer trained on the spot and two local lm-eval tasks: all offline, all in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from compress.eval.cost import Cost
from compress.eval.harness import TaskScore
from compress.eval.metrics import Metrics, Report
from compress.passes import Taxon

WORDS = [
    "red",
    "green",
    "blue",
    "dog",
    "cat",
    "bird",
    "runs",
    "sleeps",
    "jumps",
    "over",
    "under",
    "near",
    "the",
    "river",
]


@dataclass(frozen=True)
class Settings:
    """The attributes of ``compress.recipe.Evaluation`` that the harness reads."""

    tasks: tuple[str, ...]
    include: tuple[str, ...]
    limit: int | None = None
    batch_size: int = 4
    n_shot: int | None = None
    task_seed: int | None = None
    task_data: str | None = None
    log_samples: bool = False


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small gain nothing from threads, and lose much where other processes hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fail on any download, and keep every cache inside the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def sentence(generator: torch.Generator, n_words: int) -> str:
    picks = torch.randint(len(WORDS), (n_words,), generator=generator).tolist()
    return " ".join(WORDS[pick] for pick in picks)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of random weights and its byte-level BPE tokenizer, saved as any checkpoint is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny-llama")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = torch.Generator().manual_seed(0)
    bpe.train_from_iterator([sentence(generator, 12) for _ in range(50)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(directory)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(model_directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer(model_directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_directory)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A multiple-choice task and a rolling log-likelihood task over local JSON lines, and a group of the two."""
    directory = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(1)
    choices = [
        {
            "question": sentence(generator, 5),
            "choices": [sentence(generator, n_words) for n_words in (1, 2, 4)],
            "answer": index % 3,
        }
        for index in range(15)
    ]
    pages = [{"page": sentence(generator, 30 + index)} for index in range(4)]
    for name, rows in (("choices", choices), ("pages", pages)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "tiny_choice.yaml").write_text(
        f"""
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
    )
    (directory / "tiny_pages.yaml").write_text(
        f"""
task: tiny_pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/pages.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: page
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""
    )
    (directory / "tiny_group.yaml").write_text(
        """
group: tiny_group
task: [tiny_choice]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
"""
    )
    return Settings(tasks=("tiny_choice", "tiny_pages"), include=(str(directory),))


@pytest.fixture
def make_metrics():
    """A factory of measured models: label, bytes on disk, accuracy."""
    return _make_metrics


def _make_metrics(label: str, size: int, accuracy: float, *, bits_per_byte: float = 1.0, **more) -> Metrics:
    choice = TaskScore(
        metrics={"acc": accuracy, "acc_norm": accuracy},
        stderr={"acc": 0.02, "acc_norm": 0.02},
        primary="acc_norm",
        higher_is_better=True,
        n_samples=100,
    )
    text = TaskScore(
        metrics={"bits_per_byte": bits_per_byte},
        stderr={"bits_per_byte": None},
        primary="bits_per_byte",
        higher_is_better=False,
        n_samples=10,
    )
    return Metrics(
        label=label,
        model=f"runs/{label}",
        digest=f"digest of {label}",
        cost=Cost(bytes_on_disk=size, weight_bytes=max(size - 100, 0)),
        tasks={"choice": choice, "text": text},
        **more,
    )


@pytest.fixture
def report() -> Report:
    """A base of 100 MB and six points of every kind: a chain, an unknown leaf, hostile and mathematical labels."""
    base = _make_metrics("base", 100_000_000, 0.8)
    whole = Report(title="tiny <model>", base=base, command="compress run 'a b' && x")
    rows = [
        ("gptq", 30_000_000, 0.78, Taxon.WEIGHT_ONLY.value, ("gptq:bits=4",), None),
        ("wanda", 100_000_000, 0.7, Taxon.UNSTRUCTURED.value, ("wanda:sparsity=0.5",), None),
        ("wanda+gptq", 30_000_000, 0.69, Taxon.WEIGHT_ONLY.value, ("wanda:sparsity=0.5", "gptq:bits=4"), "wanda"),
        ("<script>alert(1)</script>", 60_000_000, 0.75, Taxon.LOW_RANK.value, ("svd",), None),
        ("cost $x_1$ & more", 45_000_000, 0.6, "somebody / else", ("new",), "no such parent"),
        ("ruined", 20_000_000, 0.0, Taxon.SHARING.value, ("fold",), None),
    ]
    for label, size, accuracy, taxon, passes, parent in rows:
        whole = whole.add(_make_metrics(label, size, accuracy, taxon=taxon, passes=passes, parent=parent))
    return whole
