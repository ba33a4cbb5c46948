"""Fixtures of all tests, and how tests share processes and fixtures.

It imports no torch: the process that hands out the tests reads it too, and needs none.
"""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import shutil
import signal
import subprocess
import tempfile

# Threads of several test processes would fight over the machine's cores; and no test may wait for a
# model hub that is not there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.support import forked
from tests.support.programs import skip_without

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LONGEST_FIRST = (
    *("test_slurm.py", "test_watch.py", "test_launcher.py", "test_train.py", "test_faults.py"),
    *("test_backends.py", "test_shards.py", "test_quantised.py", "test_on_policy.py"),
    *("test_packaging.py", "test_api.py", "test_notebook.py", "test_sinks.py", "test_export.py"),
    *("test_bad_input.py", "test_shipped.py", "test_plan.py", "test_memory.py", "test_moe.py"),
    *("test_extending.py", "test_config.py", "test_docs.py", "test_imports.py"),
)
"""A worker takes a file at a time, so the longest must not be the last. Slurm mostly waits, and is
over when the test of it among the backends begins."""
UNIT_CPU_S = 10
"""What a test without a marker may take, whatever else the machine does."""


def cpu_s() -> float:
    """CPU seconds of this process, of its children that have ended, and of what was forked."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used) + forked.cpu_s()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays; without this, each full collection of garbage goes through it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    begin = cpu_s()
    yield
    spent = cpu_s() - begin
    if spent > UNIT_CPU_S and not any(map(item.get_closest_marker, ("process", "matrix"))):
        pytest.fail(
            f"{spent:.0f} CPU seconds: more than {UNIT_CPU_S} need the marker process or matrix",
            pytrace=False,
        )


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command called in the tests' process leaves no handler of signals behind."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real preference pairs that lie beside a development checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real pairs at {folder}")
    return folder


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real Slurm of two nodes on this machine, for the commands and runs that tests start.

    Test processes have it one after the other: two would want the same ports.
    """
    skip_without("slurmctld", "slurmctld slurmd slurm-client munge")
    skip_without("slurmdbd", "slurmdbd mariadb-server-core mariadb-client-core")
    script = Path(__file__).parent / "support" / "slurm" / "cluster.sh"
    root = tmp_path_factory.mktemp("slurm")
    with (Path(tempfile.gettempdir()) / "simpo-test-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.environ["SLURM_CONF"] = str(root / "slurm.conf")
        try:
            subprocess.run(["bash", script, "up", root], check=True)
            yield root
        finally:
            subprocess.run(["bash", script, "down", root], check=True)
            del os.environ["SLURM_CONF"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The converted built-in model; fetched on first use."""
    from simpo.model.smollm2 import smollm2_folder

    return smollm2_folder(Path("~/.cache/simpo").expanduser())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk with a tokenizer trained on the demo's text: whole runs in seconds."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from simpo.config.paths import TEMPLATES
    from simpo.data.demo.records import demo_records

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    texts = (turn["content"] for row in demo_records(0, "train") for turn in row["prompt"])
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=(TEMPLATES / "chatml.jinja").read_text(),
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the tokenizer of the other, and rows of whole blocks."""
    from tests.support.tiny_models import WIDE, tiny_model

    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("wide") / "model")
    (folder / "model.safetensors").unlink()
    tiny_model("llama", **WIDE, vocab_size=384).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_run(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Overrides of a whole run that takes seconds: 6 steps of 4 pairs, 16 pairs held out."""
    from tests.support.whole_runs import tiny_overrides

    return tiny_overrides(tiny_folder, tmp_path)


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without a login."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its variables once in a process
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
