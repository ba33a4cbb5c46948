"""Every file and command of docs/extending.md runs; errors in such code are reported in a line."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from transformers import AutoModelForCausalLM

from simpo.config.check import GROUPS, load_run, run_yaml
from simpo.config.compose import compose_run
from simpo.config.data import FORMATS
from simpo.config.errors import ConfigError, DataError
from simpo.config.flat import settings
from simpo.config.losses import LOSSES, own_losses
from simpo.data.loader import read_mixture
from simpo.data.mixture import Mixture
from simpo.loop.score import check_loss
from tests.support.forked import Forked
from tests.support.whole_runs import finish, metrics_of, run, start

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
FILE = re.compile(r"`([\w./]+)`:\n\n```\w+\n(.*?)```", re.DOTALL)
COMMANDS = re.compile(r"```sh\n(.*?)```", re.DOTALL)
# As small as `tiny_run` for what that does not set.
SMALL = ["on_policy.num_prompts=2", "on_policy.max_new_tokens=4", "on_policy.keep_cut=true"]


@dataclass(frozen=True)
class Section:
    title: str
    files: dict[str, str]
    commands: list[list[str]]

    def write(self, folder: Path) -> None:
        for name, text in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def section(text: str) -> Section:
    lines = [line for block in COMMANDS.findall(text) for line in block.splitlines()]
    title = text.partition("\n")[0]
    return Section(title, dict(FILE.findall(text)), [shlex.split(line) for line in lines])


PARTS = {part.title: part for part in map(section, SECTIONS)}
SWEEPS = [words for part in PARTS.values() for words in part.commands if "-m" in words[2:]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with every file of the page; what they register is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(GROUPS, "loss", {**GROUPS["loss"]})
    for part in PARTS.values():
        part.write(tmp_path)
    yield tmp_path
    repo = ConfigStore.instance().repo
    for choices in (repo.get("loss", {}), repo["schema"]["loss"]):
        for name in {name for name in choices if name.removesuffix(".yaml") not in LOSSES}:
            del choices[name]


def forget(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)


def execute(words: list[str], tiny_run: list[str]) -> str:
    """A command of the page on a tiny model and tiny data, wherever the command names no other."""
    assert words[0] == "python"
    if words[1] != "-m":
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")
        return ""
    # Behind the options: argparse wants the settings side by side.
    first = next(index for index, word in enumerate(words) if "=" in word)
    return finish(Forked(["-m", *words[2:first], *tiny_run, *SMALL, *words[first:]]))


def test_the_page_is_short_and_whole() -> None:
    """Five parts, each with commands, no file of 30 lines or more, no block that nobody runs."""
    assert len(PARTS) == 5
    for part in PARTS.values():
        assert part.commands, part.title
        assert all(len(text.splitlines()) < 30 for text in part.files.values()), part.title
    blocks = sum(len(part.files) for part in PARTS.values()) + len(COMMANDS.findall(PAGE))
    assert PAGE.count("```") == 2 * blocks


@pytest.mark.parametrize("title", PARTS)
def test_commands(
    title: str,
    here: Path,
    tiny_run: list[str],
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget(monkeypatch, "quiet")
    monkeypatch.setattr(sys, "argv", sys.argv)
    for words in filter(lambda words: words not in SWEEPS, PARTS[title].commands):
        words = [str(tiny_folder) if w == "FOLDER_OF_A_LLAMA" else w for w in words]
        output = execute(words, tiny_run)
        for line in EXPECTED.get(words[-1], []):
            assert line in output, output
    if title == "A model family":
        (folder,) = (path.parent for path in here.rglob("outputs/**/results.json"))
        model = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=True)
        assert type(model).__name__ == "QuietForCausalLM"


@pytest.mark.matrix
def test_a_sweep_over_keys_of_a_loss(here: Path, tiny_run: list[str]) -> None:
    """Each member is a process that reads its settings from run.yaml."""
    (words,) = SWEEPS
    execute(words, tiny_run)
    runs = [load_run(path.with_name("run.yaml")) for path in here.rglob("outputs/**/results.json")]
    assert sorted(vars(run.loss)["power"] for run in runs) == [1, 2]


EXPECTED = {
    "loss.power=3": ["loss = max(0, 0.5 - (l_w - l_l))^3,  l = mean token log-prob of a response"],
    "loss.compare=all": [
        "loss = max(0, 0.5 - (l_w - l_l))^2,  l = mean token log-prob of a response; mean over ",
        "read as replies with scores, 2 records of 2 to 3 replies",
    ],
    "loss.module=my_lists": ["loss = -sum_i score_i*softmax_i(2*l),  l = mean token log-prob"],
    "loss=centred": ["loss = -log sigmoid(2*(d - mean d)),  d = l_w - l_l"],
    "loss=unsure": ["loss = -log sigmoid(2*(l_w - l_l) - 1),  l = mean token log-prob"],
    "pairs=4": ["Name a colour.", "chosen: A wren.", "rejected: No."],
    "train.pairs_per_step=2": ["plan   2 steps of 2 pairs"],
}
"""What commands of the page print, by their last word."""


@pytest.mark.matrix
def test_a_loss_on_two_processes_is_the_shipped_one(here: Path, tiny_run: list[str]) -> None:
    """To the power of 1 it is RePO. The file of the menu is that of a shipped loss."""
    own = [*tiny_run, "loss=power", "loss.module=my_losses", "loss.power=1"]
    many = ["backend=ddp", "backend.processes=2", "backend.device=cpu", f"run_dir={here}/own"]
    run([*own, *many])
    run([*tiny_run, "loss=repo", f"run_dir={here}/repo"])
    numbers, wanted = metrics_of(here / "own"), metrics_of(here / "repo")
    assert len(numbers) == len(wanted) > 6
    for line, other in zip(numbers, wanted, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)
    menu = PAGE.partition("`conf/loss/power.yaml`:\n\n```yaml\n")[2].partition("```")[0]
    shipped = Path(__file__).resolve().parents[1] / "conf/loss/repo.yaml"
    strip = re.compile("#.*\n")
    assert strip.sub("", menu) == strip.sub("", shipped.read_text()).replace("repo", "power")


def test_a_changed_module_is_noticed(here: Path, tiny_run: list[str]) -> None:
    """A run is continued with the same file only, from its folder alone too."""
    command = [*tiny_run, "loss=power", "loss.module=my_losses", f"run_dir={here}/run"]
    run(command)
    folder, module = here / "run", here / "my_losses.py"
    written = hashlib.sha256(module.read_bytes()).hexdigest()
    edited = hashlib.sha256(module.read_bytes() + b"# edited\n").hexdigest()
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
    text = module.read_text()
    module.write_text(text + "# edited\n")
    printed = finish(start(command), 2)
    assert printed.splitlines()[-1] == (
        f"{folder}: the code of loss.module changed under this run: loss_sha256 was {written}, "
        f"is {edited} (restore it, or start anew with run_dir=NEW)"
    )
    module.write_text(text)
    output = finish(Forked(["-m", "simpo.launch.member", str(folder)]))
    assert f"{folder}, continued after step 6" in output


def test_a_report_reads_settings_without_the_module(
    here: Path, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*tiny_run, "loss=power", "loss.module=my_losses", "loss.power=3"]
    forget(monkeypatch, "my_losses")
    run = compose_run(overrides)
    (here / "run.yaml").write_text(run_yaml(run))
    assert load_run(here / "run.yaml") == run
    del GROUPS["loss"]["power"]
    forget(monkeypatch, "my_losses")
    (here / "my_losses.py").unlink()
    assert settings(load_run(here / "run.yaml", check=False)) == settings(run)
    with pytest.raises(ConfigError) as caught:
        load_run(here / "run.yaml")
    assert str(caught.value) == (
        "loss.module: my_losses cannot be imported: No module named 'my_losses' "
        "(start in its folder, or add that to PYTHONPATH)"
    )


LOSS = """
from dataclasses import dataclass
from simpo.loss import LossConfig
"""
METHODS = """
class Methods:
    def preference(self, logps):
        return Preference(logps.chosen, logps.chosen, logps.rejected)
    def terms(self):
        return "s", "s = sum"

"""
NAMED = (
    "from dataclasses import dataclass\nfrom simpo.loss.simpo import HingeConfig\n"
    "@dataclass(kw_only=True)\nclass Mine(HingeConfig):\n    name"
)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", " defines no loss (a dataclass derived from simpo.loss.LossConfig)"),
        ("raise SystemExit", " cannot be imported: it ends the process (faulty.py, line 1)"),
        ("\n1/0", " cannot be imported: division by zero (faulty.py, line 2)"),
        (
            "import nothing_x",
            " cannot be imported: No module named 'nothing_x' (faulty.py, line 1)",
        ),
        ("1 +", " cannot be imported: invalid syntax (faulty.py, line 1)"),
        (
            f"{LOSS}\n@dataclass\nclass Mine(LossConfig):\n    name: str = 'm'\n    x: float\n",
            " cannot be imported: non-default argument 'x' follows default argument (faulty.py, "
            "line 5)",
        ),
        (
            f"{LOSS}\nclass Mine(LossConfig):\n    name = 'mine'",
            ":Mine is not a dataclass (put @dataclass(kw_only=True) above it)",
        ),
        (
            f"{LOSS}\n@dataclass(kw_only=True)\nclass Mine(LossConfig):\n    name: str = 'mine'",
            ":Mine lacks preference, terms",
        ),
        (
            "from dataclasses import dataclass\nfrom simpo.loss.simpo import HingeConfig\n"
            "@dataclass(kw_only=True)\nclass Mine(HingeConfig):\n    pass",
            ":Mine must have a name of its own, got hinge, which simpo has (write "
            'name: str = "..." in it)',
        ),
        (
            f"{NAMED}: str = 'simpo'",
            ":Mine must have a name of its own, got simpo, which simpo has (write "
            'name: str = "..." in it)',
        ),
        (
            f"{NAMED}: str = 'one'\n@dataclass(kw_only=True)\nclass Other(Mine):\n    pass",
            ":Other must have a name of its own, got one, which Mine has (write "
            'name: str = "..." in it)',
        ),
        (
            f"{LOSS}{METHODS}@dataclass(kw_only=True)\nclass Mine(Methods, LossConfig):\n    pass",
            ':Mine has no name (write name: str = "..." in it)',
        ),
        (
            "from dataclasses import dataclass\nfrom simpo.loss.simpo import HingeConfig\n"
            "@dataclass(kw_only=True)\nclass Mine(HingeConfig):\n    name: str = 'mine'\n"
            "    knob: object = None",
            ":Mine.knob cannot be settings: Unexpected type annotation: object",
        ),
        (
            f"{NAMED}: str = 'mine'\n    alphas: list = 0.8",
            ":Mine.alphas cannot be settings: Invalid value assigned: float is not a ListConfig, "
            "list or tuple.",
        ),
        (
            f"{NAMED}: str = 'mine'\n    folder: 'Path' = None",
            ":Mine cannot be settings: name 'Path' is not defined",
        ),
        *(
            (
                f"{NAMED}: str = {name!r}",
                f":Mine must have a name of letters, digits and _, got {name!r} (write "
                'name: str = "..." in it)',
            )
            for name in (None, 7, "", "a/b", "null", "123")
        ),
    ],
)
def test_modules_without_a_loss(
    source: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "faulty.py").write_text(source + "\n")
    forget(monkeypatch, "faulty")
    with pytest.raises(ConfigError) as caught:
        compose_run(["loss=mine", "loss.module=faulty"])
    assert str(caught.value) == f"loss.module: faulty{message}"


def test_losses_may_share_a_base(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = f"{LOSS}{METHODS}@dataclass(kw_only=True)\nclass Base(Methods, LossConfig):\n    pass\n"
    (here / "family.py").write_text(
        f"{base}@dataclass(kw_only=True)\nclass Mine(Base):\n    name: str = 'mine'\n"
    )
    forget(monkeypatch, "family")
    monkeypatch.delitem(GROUPS["loss"], "mine", raising=False)
    assert list(own_losses("family")) == ["mine"]


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ("loss=power loss.powr=3", ["loss.powr: no such key (did you mean loss.power?)"]),
        ("loss=power loss.power=x", ["loss.power: must be a whole number, got x"]),
        ("loss=power loss.power=0", ["loss.power: must be 1 or more, got 0"]),
        ("loss=hinge", ["loss.module: my_losses defines no loss hinge (write loss=power)"]),
    ],
)
def test_mistakes_in_settings_of_a_loss(
    overrides: str, lines: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch, "my_losses")
    with pytest.raises(ConfigError) as caught:
        compose_run(["loss.module=my_losses", *overrides.split()])
    assert caught.value.problems == lines


def test_an_attribute_without_a_type(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "untyped.py").write_text(f"{NAMED}: str = 'untyped'\n    alpha = 0.8\n")
    forget(monkeypatch, "untyped")
    with pytest.raises(ConfigError) as caught:
        compose_run(["loss=untyped", "loss.module=untyped", "loss.alpha=2"])
    assert caught.value.problems == [
        "loss.alpha: no setting, as it has no type in Mine (write alpha: float = 0.8)"
    ]


def test_a_misspelt_loss_of_ones_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, "my_losses")
    with pytest.raises(ConfigError) as caught:
        compose_run(["loss=powr", "loss.module=my_losses"])
    (line,) = caught.value.problems
    assert line.startswith("loss: no such choice, got powr (choose from alphapo, ")
    assert ", orpo, plackett_luce, power, r_dpo, " in line


@pytest.mark.parametrize(
    ("methods", "fault"),
    [
        ("    def terms(self):\n        return 's'\n", "terms must return two texts, {}, got 's'"),
        (
            "    def terms(self):\n        return self.bta, 's'\n",
            "terms fails: AttributeError: 'Mine' object has no attribute 'bta' (says.py, line 9)",
        ),
        (
            "    def problems(self):\n        return None\n",
            "problems fails: TypeError: 'NoneType' object is not iterable",
        ),
        (
            "    def problems(self):\n        yield 1 / 0\n",
            "problems fails: ZeroDivisionError: division by zero (says.py, line 9)",
        ),
        (
            "    def problems(self):\n        exit(3)\n",
            "problems fails: SystemExit: 3 (says.py, line 9)",
        ),
        (
            "    def problems(self):\n        return [None]\n",
            'problems must return a list of texts such as "alpha: must be above 0", got [None]',
        ),
        ("    def problems(self):\n        return 'beta: bad'\n", "loss.beta: bad"),
        *(
            (
                f"    def __post_init__(self):\n        {refuse}\n",
                f"loss.module: says:Mine fails: {text} (says.py, line 9)",
            )
            for refuse, text in (
                ("raise ValueError('beta is bad')", "ValueError: beta is bad"),
                ("self.beta.x()", "AttributeError: 'float' object has no attribute 'x'"),
                ("exit(4)", "SystemExit: 4"),
            )
        ),
    ],
)
def test_what_a_loss_says_is_checked(
    methods: str, fault: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "says.py").write_text(
        "from dataclasses import dataclass\nfrom simpo.loss.simpo import HingeConfig\n\n\n"
        f"@dataclass(kw_only=True)\nclass Mine(HingeConfig):\n    name: str = 'mine'\n{methods}"
    )
    forget(monkeypatch, "says")
    with pytest.raises(ConfigError) as caught:
        compose_run(["loss=mine", "loss.module=says"])
    place = "" if fault.startswith("loss.") else "loss.module: says:Mine."
    assert str(caught.value) == place + fault.format("formula and legend")


GOOD = "Preference(logps.chosen, logps.chosen, logps.rejected)"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (f"return {GOOD}", ""),
        ("raise ValueError('bad')", "fails: ValueError: bad (computes.py, line 10)"),
        (
            "return Preference(logps.log_ratios()[0], logps.chosen, logps.rejected)",
            "fails: AssertionError: scored without a reference (computes.py, line 10); "
            "needs_reference, needs_scores, needs_squares are False",
        ),
        (
            "return Preference(logps.chosen * logps.margins, logps.chosen, logps.rejected)",
            "fails: TypeError: unsupported operand type(s) for *: 'Tensor' and 'NoneType' "
            "(computes.py, line 10); needs_reference, needs_scores, needs_squares are False",
        ),
        *(
            (
                f"return {found}",
                "must return a Preference of three differentiable float32 tensors [pairs], got "
                + got,
            )
            for found, got in (
                ("None", "None"),
                ("logps.chosen", "Tensor"),
                (
                    "Preference(logps.chosen.sum(), logps.chosen, logps.rejected)",
                    "losses of shape [] instead of [2]",
                ),
                (
                    "Preference(logps.chosen.detach(), logps.chosen, logps.rejected)",
                    "losses without a gradient",
                ),
                (
                    "Preference(logps.chosen[:, None], logps.chosen, logps.rejected)",
                    "losses of shape [2, 1] instead of [2]",
                ),
                ("Preference(logps.chosen, 0.0, logps.rejected)", "chosen of type float"),
                (
                    "Preference(logps.chosen.squeeze(), logps.chosen, logps.rejected)",
                    "of a single prompt losses of shape [] instead of [1]",
                ),
                (
                    "Preference(logps.chosen, logps.chosen, logps.rejected_tokens)",
                    "rejected of torch.int64",
                ),
                (
                    "Preference(logps.chosen.half(), logps.chosen, logps.rejected)",
                    "losses of torch.float16",
                ),
            )
        ),
        *(
            (
                f"return Preference({losses}, logps.chosen, logps.rejected)",
                ": what it returns for a pair depends on the other pairs (set couples_step: "
                "ClassVar[bool] = True in the class)",
            )
            for losses in (
                "logps.chosen - logps.chosen.mean()",
                "logps.chosen * logps.chosen_tokens.float().mean()",
                "logps.chosen - logps.chosen.detach().max()",
            )
        ),
        ("import torch; s = torch.rand(2) * logps.chosen; return Preference(s, s, s)", ""),
    ],
)
def test_what_a_loss_computes_is_checked(
    body: str, fault: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "computes.py").write_text(
        f"{LOSS}from simpo.loss import Preference\n\n@dataclass(kw_only=True)\n"
        "class Mine(LossConfig):\n    name: str = 'mine'\n"
        f"    def preference(self, logps):\n        {body}\n"
        "    def terms(self):\n        return '-s', 's = sum'\n"
    )
    forget(monkeypatch, "computes")
    loss = compose_run(["loss=mine", "loss.module=computes"]).loss
    if not fault:
        check_loss(loss)
        return
    with pytest.raises(ConfigError) as caught:
        check_loss(loss)
    fault = fault if fault.startswith(":") else f" {fault}"
    assert str(caught.value) == f"loss.module: computes:Mine.preference{fault}"


@pytest.mark.parametrize(
    ("more", "body", "fault"),
    [
        ("compare: Compare | None = Compare.all", "-logps.margins.nan_to_num() * logps.chosen", ""),
        (
            "compare: Compare | None = Compare.all",
            "logps.log_ratios()[0]",
            "preference fails: AssertionError: scored without a reference (checked.py, line 12); "
            "needs_reference is False",
        ),
        (
            "compare: Compare | None = Compare.all",
            "logps.chosen - logps.chosen.mean()",
            "preference: what it returns for a pair depends on the other pairs (set couples_step: "
            "ClassVar[bool] = True in the class)",
        ),
        ("couples_step = True", "logps.chosen - logps.chosen.mean()", ""),
        ("weighs_tokens = True\n    weights = 'ones_like(tokens.logps)'", "-logps.chosen", ""),
        (
            "weighs_tokens = True\n    weights = 'ones(3)'",
            "-logps.chosen",
            "token_weights must return a weight for each token, float32 [15] for 15 of them, "
            "got torch.float32 [3]",
        ),
        (
            "weighs_tokens = True\n    weights = 'wrong'",
            "-logps.chosen",
            "token_weights fails: NameError: name 'wrong' is not defined (checked.py, line 15)",
        ),
    ],
)
def test_a_loss_of_ranks_or_of_tokens_is_checked(
    more: str, body: str, fault: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets what such a loss gets in a run: margins of each two responses, weighted sums."""
    (here / "checked.py").write_text(
        f"{LOSS}from torch import ones, ones_like\nfrom simpo.loss import Compare, Preference\n\n"
        "@dataclass(kw_only=True)\n"
        f"class Mine(LossConfig):\n    name: str = 'mine'\n    {more}\n"
        f"    def preference(self, logps):\n"
        f"        return Preference({body}, logps.chosen, logps.rejected)\n"
        "    def token_weights(self, tokens):\n        return eval(self.weights)\n"
        "    def terms(self):\n        return '-s', 's = sum'\n"
    )
    forget(monkeypatch, "checked")
    loss = compose_run(["loss=mine", "loss.module=checked"]).loss
    if not fault:
        check_loss(loss)
        return
    with pytest.raises(ConfigError) as caught:
        check_loss(loss)
    assert str(caught.value) == f"loss.module: checked:Mine.{fault}"


def read_with(form: str, **settings: str) -> Mixture:
    more = [f"data.{key}={value}" for key, value in settings.items()]
    source = f"data.sources=[{{path: qa.jsonl, format: {form}}}]"
    return read_mixture(compose_run(["data=jsonl", source, *more]))


def test_a_format_that_returns_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "no_readers.py").write_text(
        "def qa(record):\n    if 'bird' not in record['question']:\n"
        "        return {'prompt': record['question'], 'chosen': 'a', 'rejected': 'b'}\n"
    )
    forget(monkeypatch, "no_readers")
    with pytest.raises(DataError) as caught:
        read_with("no_readers:qa")
    assert str(caught.value).splitlines() == [
        "qa.jsonl train record 2: no_readers:qa: must return a record or a list of them, got None",
        "(mend the records, or leave them out with data.on_bad_record=drop)",
    ]


def test_records_of_ones_own_format(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the function raises is the record's fault; what it returns is checked as any record."""
    forget(monkeypatch, "my_readers")
    with (here / "qa.jsonl").open("a") as file:
        file.write('{"question": "Why?"}\n')
        same = {"question": "Who?", "answers": [{"text": "I", "votes": 1}] * 2}
        file.write(json.dumps(same) + "\n")
    mixture = read_with("my_readers:qa", on_bad_record="drop")
    pairs = {
        pair.prompt[0]["content"]: tuple(turns[0]["content"] for turns in pair.responses)
        for pair in mixture.train
    }
    assert pairs == {
        "Name a colour.": ("Blue.", "Yes."),
        "Name a bird.": ("A wren.", "No."),
        "Name a tree.": ("An oak.", "Oh."),
        "Name a fish.": ("A carp.", "Hm."),
    }
    with pytest.raises(DataError) as caught:
        read_with("my_readers:qa")
    assert str(caught.value).splitlines() == [
        "qa.jsonl train record 5: my_readers:qa: KeyError: 'answers' (my_readers.py, line 3)",
        "qa.jsonl train record 6: chosen and rejected are the same",
        "(mend the records, or leave them out with data.on_bad_record=drop)",
    ]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            "qa",
            "data.sources[0].format: must be a shape or module:function, got qa (shapes: "
            f"{', '.join(FORMATS)})",
        ),
        (
            "''",
            "data.sources[0].format: must be a shape or module:function, got '' (shapes: "
            f"{', '.join(FORMATS)})",
        ),
        (
            "hh-rlhf",
            "data.sources[0].format: must be a shape or module:function, got hh-rlhf (did you "
            "mean hh_rlhf?)",
        ),
        (
            "my_readers:__name__",
            "data.sources[0].format: my_readers:__name__ must be a function, got 'my_readers'",
        ),
        (
            "json:loads",
            "data.sources[0].format: json is hidden by another module of that name (rename "
            "json.py)",
        ),
        (
            "my_readers:qq",
            "data.sources[0].format: my_readers:qq cannot be imported: module 'my_readers' has no "
            "attribute 'qq'",
        ),
        (
            "readers:qa",
            "data.sources[0].format: readers:qa cannot be imported: No module named 'readers' "
            "(start in its folder, or add that to PYTHONPATH)",
        ),
    ],
)
def test_formats_that_cannot_be(
    form: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch, "my_readers")
    (here / "json.py").touch()
    with pytest.raises(ConfigError) as caught:
        read_with(form)
    assert str(caught.value) == message
