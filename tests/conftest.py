"""What every test here shares: no network, tiny checkpoints of every architecture, and runs without a subprocess.

The checkpoints have two layers, random weights large enough that logits differ clearly, and random norms and biases (a
fresh model's are all ones and zeros, which hides mistakes).
"""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 256
WINDOW = 12  # sliding attention of the families that have it; calibration windows are longer

_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_WITHOUT_GROUPS = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, dict] = {
    "llama": {**_SHAPE, "model_type": "llama", "tie_word_embeddings": True},
    "llama-untied": {**_SHAPE, "model_type": "llama", "tie_word_embeddings": False, "attention_bias": True},
    "mistral": {**_SHAPE, "model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {**_SHAPE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_SHAPE, "model_type": "qwen3", "head_dim": 24},
    "gemma2": {
        **_SHAPE, "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW,
        "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0,
    },
    "phi3": {**_SHAPE, "model_type": "phi3", "pad_token_id": 1, "sliding_window": WINDOW},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 64, "n_inner": 112, "n_layer": 2, "n_head": 4,
        "n_positions": 128,
    },
    "opt": {
        **_WITHOUT_GROUPS, "model_type": "opt", "ffn_dim": 112, "word_embed_proj_dim": 64, "pad_token_id": 1,
    },
    "gpt_neox": {**_WITHOUT_GROUPS, "model_type": "gpt_neox", "use_parallel_residual": True, "rotary_pct": 0.5},
}  # fmt: skip


class Outcome(NamedTuple):
    """What a command left: its exit code, and what it printed."""

    code: int | None
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command's own entry point, in this process."""

    from compress.cli import main

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Outcome(stopped.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    return call


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much where other processes hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """What a test draws is the same on every run, whichever tests ran before it in its process."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Baselines and tasks that the package keeps between runs go where the session's files go."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["COMPRESS_CACHE"] = str(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text: 6000 made-up words of one to three syllables, the frequent ones frequent."""
    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bdfklmnprst" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(300)]
    picked = draw.choices(words, weights=[1 / (rank + 1) for rank in range(len(words))], k=6000)
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(". ".join(" ".join(picked[start : start + 12]) for start in range(0, len(picked), 12)))
    return file


@pytest.fixture(scope="session")
def tokenizer(text_file: Path):
    """A byte-level BPE tokenizer of that text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 6, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe.train_from_iterator([text_file.read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def build_model(family: str, **changes) -> nn.Module:
    """A random model of that family of ``CONFIGS``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    defaults = {"initializer_range": 0.2, "init_std": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    settings = {**defaults, **CONFIGS[family], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Callable[..., Path]:
    """``make_checkpoint(family, dtype=float32, **config changes)`` -> directory; each is made once a session."""
    made: dict[tuple, Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes) -> Path:
        key = (family, dtype, max_shard_size, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family) / "model"
            build_model(family, **changes).to(dtype).save_pretrained(made[key], max_shard_size=max_shard_size)
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(make_checkpoint) -> Path:
    return make_checkpoint("llama")


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """(2, 40) tokens, longer than any sliding window here."""
    return torch.randint(2, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def calibration(text_file: Path):
    """Few and short windows, yet more tokens than any layer has inputs."""
    from compress.recipe import Calibration

    return Calibration(data=str(text_file), samples=10, length=24)


def sensible(key: str, **settings):
    """A pass of that method that suits a tiny model: few steps where it learns, its defaults where it does not."""
    from compress import methods
    from compress.train_pass import TrainPass

    if issubclass(methods.get(key), TrainPass):
        settings = {"steps": 3, "batch_size": 2, "length": 16, "learning_rate": 1e-3, **settings}
    few = {"iterations": 3, "epochs": 1, "search_tokens": 64, "rounds": 1, "entries": 16}
    chosen = {name: value for name, value in few.items() if name in methods.get(key).model_fields}
    return methods.build(key, chosen | settings)


@pytest.fixture(scope="session")
def make_pass() -> Callable:
    """``make_pass(method key, **settings)``: a pass with settings that suit a tiny model."""
    return sensible


@pytest.fixture(scope="session")
def make_chain(make_pass: Callable) -> Callable[..., list]:
    """``make_chain(method key, **settings)``: what a run of that method takes; a correction follows a quantizer or a
    pruner, what stores zeros a pruner, and what trains factors or scales a method that makes them."""
    from compress import methods
    from compress.passes import CorrectionPass, StoragePass

    def make(key: str, **settings) -> list:
        same_layers = {name: value for name, value in settings.items() if name in ("targets", "skip")}
        if (first := {"factors": "svd", "scales": "rtn"}.get(getattr(make_pass(key), "trains", ""))) is not None:
            return [make_pass(first, **same_layers), make_pass(key, **settings)]
        if not issubclass(methods.get(key), CorrectionPass | StoragePass):
            return [make_pass(key, **settings)]
        corrects = issubclass(methods.get(key), CorrectionPass)
        first = "wanda" if corrects and methods.get(key).moves_masks else "rtn" if corrects else "magnitude"
        return [make_pass(first, **same_layers), make_pass(key, **settings)]

    return make


@pytest.fixture(scope="session")
def run_stages(calibration, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``run_stages(source, passes, **recipe settings)`` -> artifact: all of a run but the reload in a fresh process."""
    from compress.checkpoint import Checkpoint
    from compress.gates import Gates
    from compress.pipeline import _Run
    from compress.progress import silent
    from compress.recipe import Recipe

    def run(source: Path, passes: Sequence, progress: Callable[..., None] = silent, **settings) -> Path:
        directory = tmp_path_factory.mktemp("run")
        recipe = Recipe.parse({"passes": list(passes), "calibration": calibration, "evaluation": None, **settings})
        work = _Run(recipe, source, str(source), directory / "out", False, progress, Gates())
        prepared, current = work._validate(), work.checkpoint
        for number, stage in enumerate(work.stages):
            work._stage(current, number, stage, directory / f"stage-{number}", prepared)
            current = Checkpoint(directory / f"stage-{number}" / "artifact")
        return current.path

    return run


@pytest.fixture(scope="session")
def reload() -> Callable[..., nn.Module]:
    """``reload(directory)`` -> model, as a user opens it; fails where any tensor is missing or left over."""
    return open_model


def open_model(directory: Path, dtype: torch.dtype = torch.float32, remote: bool | None = None) -> nn.Module:
    import json

    from transformers import AutoModelForCausalLM

    if remote is None:
        remote = json.loads((directory / "config.json").read_text())["model_type"] == "compress"
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, trust_remote_code=remote, output_loading_info=True
    )
    problems = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(key)}
    assert not problems, f"{directory}: {problems}"
    for (
        module
    ) in model.modules():  # bitsandbytes rounds products to bfloat16 on processors that are fast in it, in a layout of its own
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@pytest.fixture(scope="session")
def assert_reloads(reload) -> Callable[..., nn.Module]:
    """``assert_reloads(artifact)`` -> model: opened in this process, its logits are those recorded when it was made."""
    from safetensors.torch import load_file

    from compress.checkpoint import Checkpoint
    from compress.export.bitsandbytes import misread_here
    from compress.manifest import Manifest
    from compress.skeleton import Skeleton
    from compress.stream import forward
    from compress.verify import PROBE

    def check(artifact: Path, *, atol: float = 0.0, remote: bool | None = None) -> nn.Module:
        model, probe = reload(artifact, remote=remote), load_file(artifact / PROBE)
        if misread_here(checkpoint := Checkpoint(artifact), "cpu"):
            logits = forward(Skeleton(checkpoint, dtype=getattr(torch, Manifest.read(artifact).compute_dtype)), probe["tokens"])
        else:
            with torch.no_grad():
                logits = model(input_ids=probe["tokens"]).logits.float()
        torch.testing.assert_close(logits, probe["logits"], rtol=0, atol=atol)
        return model

    return check


@pytest.fixture
def make_block(make_checkpoint) -> Callable:
    """``make_block(family)`` -> the first block of a tiny checkpoint, as the engine gives it to a pass: every layer selected,
    with inputs, targets (its own outputs) and the largest inputs of each layer."""

    from compress.block import Block
    from compress.checkpoint import Checkpoint
    from compress.skeleton import Skeleton
    from compress.stats import LinearStats

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Block:
        skeleton = Skeleton(Checkpoint(make_checkpoint(family, dtype, **changes)), dtype=dtype)
        block = Block(skeleton, 0, skeleton.read_weights(0), skeleton.read_others(0))
        tokens = torch.randint(2, 256, (8, 24), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            block.inputs = next(iter(skeleton.embed([tokens])))
            block.targets = block.run(block.inputs)
            entered = block.layer_inputs(list(block.weights), block.inputs)
        for local, x in entered.items():
            block.stats[local] = LinearStats(x.shape[-1], {"absmax"})
            block.stats[local].add(x)
        block.selected = frozenset(block.weights)
        return block

    return make


# what losses and writers are given: signals and batches of random numbers, and two tiny models that differ

_N_WINDOWS, _LENGTH, _FEW_TOKENS = 4, 10, 32


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch():
    """Four windows of which the last ones count less."""
    from compress.train_pass import Batch

    counted = torch.arange(_LENGTH) >= torch.arange(_N_WINDOWS)[:, None]
    return Batch(torch.randint(_FEW_TOKENS, (_N_WINDOWS, _LENGTH), generator=torch.Generator().manual_seed(0)), counted)


@pytest.fixture
def make_signal(batch) -> Callable:
    """``make_signal(seed, n_states=0, width=8)``: hidden states and a head for the batch's tokens."""
    from compress.train_pass import Signal

    def make(seed: int, n_states: int = 0, width: int = 8):
        n = len(batch.targets)
        head = nn.utils.skip_init(nn.Linear, width, _FEW_TOKENS, bias=False).requires_grad_(False)
        head.weight.copy_(_draw(_FEW_TOKENS, width, seed=100 + seed))
        states = tuple(_draw(n, width, seed=1000 * seed + number) for number in range(n_states))
        return Signal(states[-1] if states else _draw(n, width, seed=seed), head, states)

    return make


@pytest.fixture(scope="session")
def models() -> tuple[nn.Module, nn.Module]:
    """A student and a teacher that says other things."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=_FEW_TOKENS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        made.append(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False))
    return made[0], made[1]


@pytest.fixture
def rollouts(models):
    from compress.rollouts import Rollouts

    return Rollouts(*models, seed=0, memory={})
