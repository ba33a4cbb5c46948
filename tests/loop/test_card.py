"""The model card: what the hub reads of it, code in it that runs, and names that would break it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub import hf_api as hub_client

from simpo.__main__ import main
from simpo.config.check import run_yaml
from simpo.config.compose import compose_run
from simpo.config.flat import trajectory
from simpo.config.losses import LOSSES
from simpo.config.schema import RunConfig
from simpo.data import hub
from simpo.loop.card import base_name, fenced, method, plain, write_card
from simpo.loop.console import Results
from simpo.loop.train import train
from simpo.loss.without_reference import SftConfig

RESULTS = Results({"loss": 0.5}, {"loss": 0.25})


def card_of(
    run: RunConfig,
    folder: Path,
    source: str = "me/pairs",
    pairs: int = 24,
    results: Results = RESULTS,
) -> ModelCard:
    """The card of a run that has not been trained."""
    counted = {"train_tokens": {"pairs": pairs}, "test_tokens": {"pairs": 16}}
    prints = dict.fromkeys(("train_fingerprint", "test_fingerprint", "template_sha256"), "0")
    data = {"mixture": [{"source": source, "split": "train"}], **counted, **prints}
    (folder / "data.json").write_text(json.dumps(data))
    environment = {"packages": {}, "python": "3", "device": "1 CPU", "git_commit": ""}
    (folder / "environment.json").write_text(json.dumps(environment))
    write_card(run, folder, results, folder)
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def code_of(card: str) -> str:
    found = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert found
    return found[1]


# The code of the card.


@pytest.mark.parametrize("rank", [0, 4])
def test_the_code_runs(
    rank: int,
    tiny_run: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it is in the card of a run and of a merged adapter, with the folder for the repository."""
    run_dir, template = tmp_path / "run", tmp_path / "own.jinja"
    mark = "{% if enable_thinking is defined and enable_thinking is false %}{% endif %}"
    template.write_text(mark + (tiny_folder / "chat_template.jinja").read_text())
    more = [f"model.chat_template={template}", f"model.lora.rank={rank}"]
    more += ["model.chat_template_kwargs={enable_thinking: false}"]
    train(compose_run([*tiny_run, *more, "train.max_steps=2", f"run_dir={run_dir}"]))
    if rank:
        main(["export", str(run_dir), "merge=true"])
    for folder in [run_dir / "model", *[run_dir / "model-merged"] * bool(rank)]:
        code = code_of((folder / "README.md").read_text())
        assert ("PeftModel" in code) is (bool(rank) and folder.name == "model")
        assert "    **{'enable_thinking': False},\n" in code
        code = code.replace("OWNER/NAME", str(folder))
        code = code.replace(f'("{tiny_folder.name}")  # put', f'("{tiny_folder}")  # put')
        names: dict[str, Any] = {}
        capsys.readouterr()
        exec(code, names)
        begin = names["prompt"]["input_ids"].shape[1]
        assert begin > 5 and len(names["output"]) > begin
        reply = names["tokenizer"].decode(names["output"][begin:], skip_special_tokens=True)
        assert capsys.readouterr().out == f"{reply}\n"


def test_the_code_of_a_base_on_the_hub(tiny_run: list[str], tmp_path: Path) -> None:
    run = compose_run([*tiny_run, "model.lora.rank=4"])
    run.model.path, run.model.revision, run.model.trust_remote_code = "org/base", "v1", True
    code = code_of(card_of(run, tmp_path).text)
    assert (
        'base = AutoModelForCausalLM.from_pretrained("org/base", revision="v1", '
        "trust_remote_code=True)\n"
    ) in code
    run.model.lora.rank = 0
    code = code_of(card_of(run, tmp_path).text)
    assert "model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)\n" in code


# What it says of the run.


@pytest.mark.parametrize(
    ("max_steps", "pairs", "said"),
    [
        (None, 24, ""),
        (6, 24, ""),
        (1, 24, "**This is a test run of 1 step; the model is not meant for use.**"),
        (5, 24, "**This is a test run of 5 steps; the model is not meant for use.**"),
        (99, 4000, "**This is a test run of 99 steps; the model is not meant for use.**"),
        (100, 4000, "`train.max_steps` ended the training after 100 of 1000 steps."),
    ],
)
def test_a_run_that_was_cut_short_says_so_first(
    max_steps: int | None, pairs: int, said: str, tiny_run: list[str], tmp_path: Path
) -> None:
    run = compose_run(tiny_run)
    run.train.max_steps = max_steps
    blocks = card_of(run, tmp_path, pairs=pairs).text.strip().split("\n\n")
    assert blocks[0].startswith("# ") and (blocks[1] == said) is bool(said)
    assert ("test run" in " ".join(blocks)) is ("test run" in said)


def test_smoke_experiments_are_test_runs(tmp_path: Path) -> None:
    run = compose_run(["experiments=smoke/gemma2_it"])
    text = card_of(run, tmp_path, pairs=800).text
    assert "\n\n**This is a test run of 4 steps; the model is not meant for use.**\n\n" in text
    assert "\nTraining started from a 4-bit GGUF file of that model" in text


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_each_loss_has_its_own_name(loss: str, tiny_run: list[str], tmp_path: Path) -> None:
    """SimPO's name, tag and citation are on cards of its own forms only."""
    words = [f"loss={loss}", *(["loss.parts={bco: 1, repo: 1}"] if loss == "mix" else [])]
    card = card_of(compose_run([*tiny_run, *words]), tmp_path)
    simpo = loss in ("sigmoid", "hinge")
    tags = card.data.to_dict()["tags"]
    assert ("simpo" in tags) is simpo is ("@inproceedings{meng2024simpo" in card.text)
    intro = next(block for block in card.text.split("\n\n") if " after " in block)
    if loss == "sft":
        assert intro.endswith(" after training with the loss `sft`.") and tags == ["sft"]
        return
    name, link = re.findall(r" after preference optimisation with \[(.+)\]\((.+)\)\.$", intro)[0]
    assert link in (LOSSES[loss].__doc__ or "") and re.search(r"\w$", link)
    plainly = re.sub(r"\W", "", name).lower()
    known = {"sigmoid": "simpo", "hinge": "simpowithahinge", "slic": "slichf"}
    known |= {"ln_dpo": "lengthnormaliseddpo", "ipo_free": "ipowithoutareferencemodel"}
    known |= {name: f"{name}forpairs" for name in ("bco", "exo", "nca")}
    known |= {"gamma_po": "gammapo", "beta_dpo": "betadpo"}
    known |= {"robust": "robustdpo", "sppo": "sppowithhardlabels", "mix": "aweightedsumoflosses"}
    assert plainly == known.get(loss, loss.replace("_", ""))
    assert "preference-optimization" in tags


def test_a_later_round_names_the_first_model(tiny_run: list[str], tmp_path: Path) -> None:
    run, root = compose_run([*tiny_run, "model.path=owner/first"]), tmp_path / "root"
    root.mkdir()
    (root / "run.yaml").write_text(run_yaml(run))
    model = replace(run.model, path=str(root / "rounds/1/run/model"))
    own = replace(run, model=model, run_dir=str(root / "rounds/2/run"))
    assert (card := card_of(own, tmp_path)).data.to_dict()["base_model"] == "owner/first"
    assert "\nowner/first after preference optimisation with " in card.text


def test_a_loss_of_ones_own_has_its_settings_name() -> None:
    @dataclass(kw_only=True)
    class Own(SftConfig):
        name: str = "own"

    assert method(Own()) == ("the loss `own`", "")


# Licences.


def licence_of(card: ModelCard) -> dict[str, Any]:
    keys = ("license", "license_name", "license_link")
    return {key: value for key, value in card.data.to_dict().items() if key in keys}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("license: gemma", {"license": "gemma"}),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        (
            "license: other\nlicense_name: own\nlicense_link: TERMS",
            {"license": "other", "license_name": "own"},
        ),
        ("license: [mit, gpl]", {}),
        ("license_name: own", {}),
        ("license: {", {}),
        ("", {}),
    ],
)
def test_the_licence_is_the_bases(
    stated: str,
    expected: dict[str, str],
    tiny_run: list[str],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "README.md").write_text(f"---\n{stated}\n---\n# Base\n")
    (base / "LICENSE").write_text("Mine.")
    run = compose_run([*tiny_run, f"model.path={base}"])
    assert licence_of(card_of(run, tmp_path)) == expected
    (base / "README.md").unlink()
    assert licence_of(card_of(run, tmp_path)) == {}


def test_the_licence_of_a_base_on_the_hub(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the hub's cache; a link within its repository becomes an address."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--org--base"
    (repository / "snapshots/0abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0abc")
    text = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"
    (repository / "snapshots/0abc/README.md").write_text(text)
    run = compose_run(tiny_run)
    run.model.path = "org/base"
    assert licence_of(card_of(run, tmp_path)) == {
        "license": "other",
        "license_name": "own",
        "license_link": "https://huggingface.co/org/base/blob/main/LICENSE",
    }
    run.model.path = "org/other"
    assert licence_of(card_of(run, tmp_path)) == {}


# Names that would break it.

ODD = "a|b: \"c\" 'd' `e` *f* _g_ [h](i) <j> \\k ```\n---\n# ü 漢字 🐦"


def test_odd_names_break_nothing(tiny_run: list[str], tmp_path: Path) -> None:
    run = compose_run(tiny_run)
    run.name, run.model.chat_template_kwargs = ODD, {"note": ODD, "path": f"{tmp_path}/x"}
    card = card_of(run, tmp_path, source=ODD)
    assert card.data.to_dict()["library_name"] == "transformers"
    lines = card.text.strip().split("\n")
    shown = r"""a\|b: "c" 'd' \`e\` \*f\* \_g\_ \[h\](i) \<j\> \\k \`\`\` --- # ü 漢字 🐦"""
    assert lines[0] == f"# {shown}"
    (row,) = (line for line in lines if line.startswith("| a"))
    assert re.split(r"(?<!\\) *\| *", row) == ["", shown, "train", ""]
    assert [line for line in lines if line.startswith("## ")] == [
        *("## Use", "## Loss", "## Data", "## Results on 16 held-out pairs", "## Provenance"),
        "## Citation",
    ]
    fence = re.search(r"^(`{4,})yaml\n(.*?)\n\1$", card.text, re.DOTALL | re.MULTILINE)
    assert fence
    settings = yaml.safe_load(fence[2])
    assert settings["model.chat_template_kwargs"] == {"note": ODD, "path": "x"}
    assert settings["train.learning_rate"] == 1e-3
    assert settings.keys() == trajectory(run).keys()
    assert str(tmp_path) not in str(card)


def test_a_run_without_held_out_pairs(tiny_run: list[str], tmp_path: Path) -> None:
    nothing = Results({}, {})
    text = card_of(compose_run(tiny_run), tmp_path, results=nothing).text
    assert "\n\n## Results\n\nNo pairs were held out.\n\n## Provenance\n" in text


def test_a_base_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my model" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my model" / "below")
    names = [base_name(path) for path in (".", "./", "..", "../")]
    assert names == ["below", "below", "my model", "my model"]


def test_text_that_is_left_as_it_is() -> None:
    assert plain("smollm2-demo_v2 (100 %)  and\nmore") == "smollm2-demo_v2 (100 %) and more"
    assert fenced("yaml", "a: 1") == "```yaml\na: 1\n```"


# A push to a hub on this machine.


class Hub(BaseHTTPRequestHandler):
    """What a push asks of the hub; keeps the files, and checks the card as YAML with keys."""

    files: dict[str, bytes]

    def _answer(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self) -> None:
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"name": "me", "auth": {"accessToken": {"role": "write"}}, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/validate-yaml"):
            metadata = ModelCard(json.loads(body)["content"]).data.to_dict()
            self._answer({"errors": [] if metadata else [{"message": "none"}], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            plainly = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer({"files": [{"path": name, **plainly} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            page = f"{constants.ENDPOINT}/me/model/commit/{40 * '1'}"
            self._answer({"success": True, "commitOid": 40 * "1", "commitUrl": page})
        else:
            self._answer({"url": f"{constants.ENDPOINT}/me/model"})

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of a repository to which this process uploads."""
    files: dict[str, bytes] = {}
    kind = type("OneHub", (Hub,), {"files": files})
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hub_client.constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_aTokenOfNobody")
        hub.go_offline_if_unreachable.cache_clear()
        yield files
        server.shutdown()
    hub.go_offline_if_unreachable.cache_clear()


def printed_address() -> str:
    return f"hub    {constants.ENDPOINT}/me/model/commit/{40 * '1'}\n"


@pytest.mark.parametrize("rank", [0, 4])
def test_a_push_over_http(
    rank: int,
    local_hub: dict[str, bytes],
    tiny_run: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the hub's own client; the files are those of the folder, without the base's place."""
    run_dir, name = tmp_path / "run", tiny_folder.name
    more = [f"model.lora.rank={rank}", "train.max_steps=2", "sample.num_prompts=0"]
    train(compose_run([*tiny_run, *more, f"run_dir={run_dir}"]))
    capsys.readouterr()
    main(["export", str(run_dir), "push_to_hub=me/model"])
    note = f"note   the adapter's base is a local folder; uploaded it is named {name}\n"
    assert capsys.readouterr().out == note * bool(rank) + printed_address()
    here = {p.name: p.read_bytes() for p in (run_dir / "model").iterdir()}
    assert local_hub.keys() == here.keys()
    changed = {file for file, content in local_hub.items() if content != here[file]}
    assert changed == {"README.md", *["adapter_config.json"] * bool(rank)}
    for file, content in local_hub.items():
        for text in (str(tmp_path), str(tiny_folder), str(Path.home()), "hf_aToken"):
            assert text.encode() not in content, (file, text)
    card = ModelCard(local_hub["README.md"].decode())
    assert card.data.to_dict()["library_name"] == ("peft" if rank else "transformers")
    assert 'name = "me/model"' in card.text


def test_an_adapter_of_the_built_in_model_names_it_on_the_hub(
    local_hub: dict[str, bytes], tmp_path: Path
) -> None:
    """Its folder in the cache is another on each machine."""
    run = compose_run(["model.lora.rank=2", "tracker=console"])
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "run.yaml").write_text(run_yaml(run))
    place = f"{tmp_path}/cache/models/SmolLM2-135M-Instruct"
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": place}))
    (model / "adapter_model.safetensors").write_bytes(b"weights")
    main(["export", str(tmp_path), "push_to_hub=me/model"])
    sent = json.loads(local_hub["adapter_config.json"])
    assert sent == {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
