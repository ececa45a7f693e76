"""`clip-lens` from the outside: what it prints, what it writes, and what it says about bad input."""

import ast
import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from sae_lens import TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file

import clip_lens_ext as cle
from clip_lens_ext import cli
from clip_lens_ext.attribution.ranks import spearman
from clip_lens_ext.planted import normalise
from clip_lens_ext.towers.positions import TOKEN_SCOPES


@pytest.fixture(scope="module")
def batch():
    return cle.PlantedWorld(0).sample(4, seed=3, split="test", classes=["gear", "tulip", "crown"])


@pytest.fixture(scope="module")
def photos(batch, tmp_path_factory) -> Path:
    """A folder of pictures of the planted world."""
    folder = tmp_path_factory.mktemp("photos")
    for index, pixels in enumerate(batch.images):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, photos):
    """Runs `clip-lens` in an empty folder, with few reference images: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, references: bool = True) -> tuple[int, str, str]:
        more = ["--references", photos, "--top", 2, "--no-progress"] if references else []
        code = cli.main([str(argument) for argument in [*arguments[:1], *more, *arguments[1:]]])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def save_sae(folder: Path, *, d_in: int = 128, hook: str = "blocks.2.hook_resid_post", scope: str = "all") -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=64, k=8))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.token_scope = hook, scope
    sae.save_model(folder)
    return folder


def test_one_image_and_one_prompt(run, photos, batch, tmp_path):
    prompt = "a photo of a gear"
    code, out, err = run("attribute", photos / "0.png", "--prompt", prompt, "--csv", "all.csv", "--json", "all.json")
    assert (code, err) == (0, "")
    assert "No --model is given, so the embedded planted-0 runs" in out
    assert "synthetic pictures" in out
    clip, sae = cle.planted_clip(), cle.planted_sae()
    pixels, target = normalise(batch.images[:1]), cle.text_target(clip, prompt)
    patching = cle.attribution_patching(clip.vision, pixels, sae, target)
    exact = cle.exact_ablation(clip.vision, pixels, sae, target)
    lens = cle.logit_lens(clip.vision, pixels, sae, target)
    frame = pd.read_csv("all.csv").sort_values("latent")
    assert frame["latent"].tolist() == patching.latent.tolist()
    expected = {"attribution": 100 * patching.value[:, 0], "exact_ablation": 100 * exact.value[:, 0],
                "logit_lens": lens.value[:, 0], "activation": exact.activation}
    for column, values in expected.items():
        np.testing.assert_allclose(frame[column], values, rtol=1e-3, atol=2e-4)
    best = patching.top(2)
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+ ", line)]
    assert [int(row[0]) for row in rows[:2]] == best.latents[0, 0].tolist()
    assert [float(row[2]) for row in rows[:2]] == pytest.approx((100 * best.values[0, 0]).tolist(), abs=2e-3)
    by_lens = lens.top(2)
    assert [int(row[0]) for row in rows[2:4]] == by_lens.latents[0, 0].tolist()
    assert [float(row[4]) for row in rows[2:4]] == pytest.approx(by_lens.values[0, 0].tolist(), abs=2e-4)
    assert f"cosine {float(patching.prediction):+.4f}" in out
    said = re.search(r"rank correlation .*: attribution (\S+), Logit Lens (\S+)", out)
    assert float(said[1]) == pytest.approx(spearman(patching.value[:, 0], exact.value[:, 0]), abs=0.02)
    assert float(said[2]) == pytest.approx(spearman(lens.value[:, 0], exact.value[:, 0]), abs=0.02)
    found = json.loads(Path("all.json").read_text())
    assert (found["model"], found["decisions"][0]["image"]) == (clip.model_name, str(photos / "0.png"))
    picture = Path(out.split("picture: ")[1].split("\n")[0])
    assert picture == Path("explained/0-explained.png")
    with Image.open(picture) as drawn:
        assert np.asarray(drawn.convert("L")).std() > 20


def test_a_folder_with_a_broken_image(run, photos, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes((photos / name).read_bytes())
    (folder / "cut.png").write_bytes((photos / "2.png").read_bytes()[:300])
    (folder / "empty.jpg").write_bytes(b"")
    code, out, err = run("attribute", folder, "--prompt", "a photo of a gear", "--out", "here")
    assert code == 0
    assert re.fullmatch(r"clip-lens: 2 images skipped \(cut\.png: .*; empty\.jpg: the file is empty\)\n", err)
    assert sorted(path.name for path in Path("here").iterdir()) == ["0-explained.png", "1-explained.png"]
    code, out, err = run("attribute", folder / "0.png", folder / "cut.png", "--prompt", "a photo of a gear")
    assert code == 2
    assert "cannot read the image" in err
    assert "cut.png" in err
    assert "by attribution" not in out


def test_without_a_prompt_it_is_the_best_class(run, photos, batch):
    code, out, _ = run("attribute", photos / "1.png")
    prompts = list(dict.fromkeys(cle.PlantedWorld(0).prompts()))
    best = cle.planted_clip().similarity(normalise(batch.images[1:2]), prompts).argmax()
    assert code == 0
    assert f'1.png   "{prompts[best]}"' in out
    assert out.count("by attribution patching") == 1


def test_several_prompts_and_the_same_name_twice(run, photos, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "0.png"
    twin.write_bytes((photos / "1.png").read_bytes())
    code, out, _ = run("attribute", photos / "0.png", twin, "--prompt", "a gear", "--prompt", "a crown", "--out", "out")
    assert code == 0
    names = [f"0-{stem}-explained.png" for stem in ("a-gear", "a-crown", "a-gear-2", "a-crown-2")]
    assert re.findall(r"picture: out/(.*)", out) == names
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(names)


def test_one_file_as_output(run, photos):
    code, out, _ = run("attribute", photos / "0.png", "--prompt", "a gear", "--out", "new/why.pdf", "--drop-error")
    assert code == 0
    assert Path("new/why.pdf").read_bytes().startswith(b"%PDF")
    assert "error term dropped" in out
    for arguments, message in (
        ((photos, "--prompt", "a gear", "--out", "why.png"), r"--out why.png is one picture, and there are 4 to write"),
        ((photos / "0.png", "--out", photos / "0.png"), r"0.png is one of the images to explain"),
        ((photos / "0.png", "--out", "why.webp"), r"a picture is written as .png, .pdf"),
    ):
        code, _, err = run("attribute", *arguments)
        assert (code, len(err.splitlines())) == (2, 1)
        assert re.search(message, err)


def test_the_demo(run):
    code, out, err = run("demo", "--out", "demo", "--top", 2, "--no-progress", references=False)
    assert (code, err) == (0, "")
    world = cle.PlantedWorld(0)
    name = r"held-out (.*?)(?: \((\w+)\))?( with the (?:overlay|word) \w+)?"
    shown = re.findall(rf'^{name}   "(.*)"$', out, re.MULTILINE)
    assert len(shown) == 4
    for name, drawn, planted, prompt in shown:
        entry = next(entry for entry in world.classes if entry.object == (drawn or name))
        assert entry.name == name
        assert prompt == (f"a photo of a {planted.split()[-1]}" if "word" in planted else world.prompts()[entry.index])
    pictures = re.findall(r"^picture: (.*)$", out, flags=re.MULTILINE)
    assert [Path(path).parent.name for path in pictures] == ["demo"] * 4
    assert all(Path(path).stat().st_size > 50_000 for path in pictures)


@pytest.mark.parametrize(("arguments", "message"), [
    (["no-such-photo.jpg"], "no-such-photo.jpg': no such file"),
    (["PHOTO", "--prompt", ""], "a prompt is empty"),
    (["PHOTO", "--prompt", "a photo of a crance"], "'crance' .* did you mean 'crane'"),
    (["PHOTO", "--hook", "blocks.2.hook_resid_pots"], r"did you mean 'blocks\.2\.hook_resid_post'"),
    (["PHOTO", "--sae", "no-such-sae"], "no such file or folder: 'no-such-sae'"),
    (["PHOTO", "--sae", "NARROW"], "the SAE reads vectors of 64, blocks.2.hook_resid_post gives 128"),
    (["PHOTO", "--sae", "NARROW", "--hook", "blocks.9.hook_resid_post"], "blocks.9.hook_resid_post"),
    (["PHOTO", "--sae", "BROKEN"], "NaN"),
    (["PHOTO", "--model", "ViT-B-32/laion2b_s34b_b79k"], "--model needs --sae PATH"),
    (["--model", "ViT-B-32/openai", "--sae", "NARROW"], "--model needs IMAGE"),
    (["PHOTO", "--model", "ViT-B-23/openai", "--sae", "NARROW"], "did you mean 'ViT-B-32'"),
    (["PHOTO", "--model", "ViT-B-32/no-such-file.safetensors", "--sae", "NARROW"], "no weight file at no-such-file"),
    (["PHOTO", "--top", "0"], "--top takes a positive number, not 0"),
    (["PHOTO", "--top", "few"], "invalid int value: 'few'"),
    (["PHOTO", "--tokens", "some"], "invalid choice: 'some'"),
    (["PHOTO", "--device", "toaster"], "--device toaster cannot be used here"),
    (["PHOTO", "--text-embeddings", "no-such.safetensors"], "no-such.safetensors is no file of text embeddings"),
    (["PHOTO", "--out", "PHOTO/x"], r"cannot write into .*0\.png/x: .*0\.png is a file"),
    (["PHOTO", "--csv", "PHOTO/x.csv"], r"cannot write into .*0\.png: .*0\.png is a file"),
    (["PHOTO", "--prompt", "a gear", "--references", "no-such-folder"], "no such file or folder: 'no-such-folder'"),
    (["EMPTY", "--prompt", "a gear"], "no image in the folder"),
])
def test_bad_input_is_one_line_and_exit_code_2(run, photos, tmp_path, arguments, message):
    if "NARROW" in arguments:
        save_sae(tmp_path / "narrow", d_in=64)
    if "BROKEN" in arguments:
        weights = load_file(save_sae(tmp_path / "broken") / "sae_weights.safetensors")
        weights["W_dec"][3, 5] = torch.nan
        save_file(weights, tmp_path / "broken" / "sae_weights.safetensors")
    (tmp_path / "empty").mkdir()
    places = {"PHOTO": photos / "0.png", **{word.upper(): tmp_path / word for word in ("narrow", "broken", "empty")}}
    filled = [re.sub("|".join(places), lambda word: str(places[word[0]]), argument) for argument in arguments]
    code, out, err = run("attribute", *filled, references="--references" not in arguments)
    assert code == 2
    assert re.search(message, err)
    assert "by attribution" not in out
    if "usage:" not in err:
        assert len(err.splitlines()) == 1
        assert err.startswith("clip-lens: ")
    assert not (tmp_path / "explained").exists()


@pytest.fixture
def vision_only(tmp_path):
    """A vision tower alone as a weight file of an open_clip model, an SAE of it, and text embeddings from elsewhere."""
    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 48, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-cli.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-cli.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(open_clip.create_model("tiny-cli").visual.state_dict(), tmp_path / "vision.safetensors")
        vectors = torch.randn(3, 20)
    names = json.dumps(["cat", "dog", "zebra"])
    save_file({"embeddings": vectors}, tmp_path / "texts.safetensors", metadata={"names": names})
    save_sae(tmp_path / "sae", d_in=48, hook="blocks.1.hook_resid_post", scope="cls")
    return ("--model", f"tiny-cli/{tmp_path / 'vision.safetensors'}", "--sae", tmp_path / "sae")


def test_a_vision_tower_with_text_embeddings_from_a_file(run, photos, vision_only, tmp_path):
    texts = "--text-embeddings", tmp_path / "texts.safetensors"
    code, out, err = run("attribute", photos / "0.png", *vision_only, *texts, "--prompt", "dog", "--prompt", "cat",
                         "--json", "all.json")
    assert (code, err) == (0, "")
    clip = cle.load_clip(vision_only[1])
    with Image.open(photos / "0.png") as picture, torch.no_grad():
        embedding = clip.vision(clip.pixels(picture))
    vectors = load_file(tmp_path / "texts.safetensors")["embeddings"]
    expected = torch.nn.functional.cosine_similarity(embedding, vectors[[1, 0]]).tolist()
    found = json.loads(Path("all.json").read_text())["decisions"]
    assert [decision["prediction"] for decision in found] == pytest.approx(expected, abs=1e-5)
    assert "planted" not in out
    assert re.findall(r'0\.png   "(\w+)"', out) == ["dog", "cat"]
    assert "SAE at blocks.1.hook_resid_post on cls tokens" in out
    assert "no heat maps: the SAE reads the CLS token" in out
    code, out, _ = run("attribute", photos / "0.png", *vision_only, *texts)
    assert code == 0
    assert len(re.findall(r'0\.png   "(\w+)"', out)) == 1
    for arguments, message in (
        ([*texts, "--prompt", "zebras"], "did you mean 'zebra'"),
        ([*texts, "--prompt", ""], "--prompt '' is none of the 3 names"),
        (["--text-embeddings", tmp_path / "vision.safetensors", "--prompt", "cat"], "is no file of text embeddings"),
        (["--prompt", "cat"], "has no text tower: pass --text-embeddings FILE"),
    ):
        code, _, err = run("attribute", photos / "0.png", *vision_only, *arguments)
        assert (code, len(err.splitlines())) == (2, 1)
        assert re.search(message, err)


def test_tokens_and_hook_say_what_the_sae_does_not(run, photos, tmp_path):
    sae = save_sae(tmp_path / "sae")
    config = json.loads((sae / "cfg.json").read_text())
    del config["metadata"]["hook_name"], config["metadata"]["token_scope"]
    (sae / "cfg.json").write_text(json.dumps(config))
    code, _, err = run("attribute", photos / "0.png", "--prompt", "a gear", "--sae", sae)
    assert code == 2
    assert "hook_name" in err
    code, out, _ = run("attribute", photos / "0.png", "--prompt", "a gear", "--sae", sae, "--hook",
                       "blocks.3.hook_resid_post", "--tokens", "cls")
    assert code == 0
    assert "SAE at blocks.3.hook_resid_post on cls tokens" in out
    code, out, _ = run("attribute", photos / "0.png", "--prompt", "a gear", "--tokens", "patches")
    assert code == 0
    assert "SAE at blocks.2.hook_resid_post on patches tokens" in out


def test_a_terminal_without_the_letters_of_a_name(run, photos, tmp_path, monkeypatch):
    (tmp_path / "h\u00fcte.png").write_bytes((photos / "0.png").read_bytes())
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run("attribute", "h\u00fcte.png", "--prompt", "a gear")[0] == 0
    terminal.seek(0)
    assert r'h\xfcte.png   "a gear"' in terminal.read()
    assert Path("explained/h\u00fcte-explained.png").exists()


def test_interrupted(run, photos, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_lens_ext.explain.explain_images", interrupted)
    code, _, err = run("attribute", photos / "0.png", "--prompt", "a gear")
    assert (code, err) == (130, "clip-lens: interrupted\n")


def test_help_version_and_no_command(run):
    code, out, _ = run("--help", references=False)
    assert code == 0
    assert "attribute" in out
    assert "demo" in out
    code, out, _ = run("attribute", "--help", references=False)
    options = "prompt model sae hook tokens references top out csv json no-progress drop-error text-embeddings device"
    for option in options.split():
        assert f"--{option}" in out
    assert run("--version", references=False)[:2] == (0, "clip-lens-ext 0.1.0\n")
    assert run(references=False)[0] == 2


def test_the_page_names_every_option_and_no_other(run):
    page = (Path(cli.__file__).parents[1] / "docs" / "cli.md").read_text()
    commands = ((), ("attribute",), ("demo",), ("check-sae",), ("train-sae",), ("spectrum",), ("train-sparse",),
                ("name",))
    helps = [run(*command, "--help", references=False)[1] for command in commands]
    options = set(re.findall(r"--[a-z-]+", " ".join(helps))) - {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page)) == options


def test_the_scopes_are_those_of_a_vision_tower(run):
    out = run("attribute", "--help", references=False)[1]
    said = re.search(r"\(token_scope\): ([\w, ]+?) --", " ".join(out.split()))[1]
    assert set(said.split(", ")) == set(TOKEN_SCOPES) - {"eot"}


def test_it_asks_for_nothing_heavy_before_a_command_runs():
    parts = ("cli_name", "cli_sae", "cli_sparse", "cli_spectrum")
    for file, expected in {"cli.py": {"errors", *parts}, **{f"{name}.py": {"errors"} for name in parts}}.items():
        module = ast.parse(Path(cli.__file__).with_name(file).read_text())
        names = [node.module or "" for node in module.body if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in module.body if isinstance(node, ast.Import) for alias in node.names]
        outside = {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
        assert outside == {f"clip_lens_ext.{name}" for name in expected}


def test_as_a_process(photos, tmp_path):
    done = subprocess.run([sys.executable, "-m", "clip_lens_ext", "attribute", tmp_path / "none.png"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("clip-lens: cannot read the image")
    assert "Traceback" not in done.stderr


def test_check_sae(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["check-sae", "--n-images", "6", "--json", str(tmp_path / "check.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fits: explained variance 0.9")
    assert json.loads((tmp_path / "check.json").read_text())["verdict"] == "fits"
    assert cli.main(["check-sae", "--n-images", "6", "--hook", "blocks.0.hook_resid_post"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("suspicious")
    assert "hook_name='blocks.2.hook_resid_post'" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ViT-B-32/openai"], "--model needs --sae"),
        (["--model", "ViT-B-32/openai", "--sae", "x"], "--model needs IMAGE"),
        (["--n-images", "0"], "--n-images takes a positive number"),
        (["--sae", "nowhere"], "no such file or folder"),
        (["--hook", "blocks.9.hook_resid_post"], "no hook matches"),
        (["nowhere.png"], "nowhere.png"),
    ],
)
def test_check_sae_with_wrong_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-sae", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_train_sae(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hooks = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    command = ["train-sae", "--n-images", "40", "--d-sae", "128", "--k", "8", "--batch-size", "256",
               "--n-training-tokens", "25600", "--out", str(tmp_path / "saes"), "--cache", str(tmp_path / "cache"),
               *(part for hook in hooks for part in ("--hook", hook))]  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the SAE at")  # a hundred steps are not much
        assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "2 topk SAEs of planted-0, 128 latents, all tokens: trained on 25,600 tokens of 36 pictures" in out
    for hook in hooks:
        sae = cle.load_sae(tmp_path / "saes" / hook)
        row = next(line for line in out.splitlines() if line.split()[:1] == [hook])
        shown = [sae.cfg.metadata.explained_variance, sae.cfg.metadata.cosine, sae.cfg.metadata.l0]
        assert [float(number) for number in row.split()[1:4]] == pytest.approx(shown, abs=0.051)
        assert sorted(path.name for path in (tmp_path / "cache" / hook).iterdir())[0] == "activations.json"
    assert cli.main(command) == 0  # finished: loaded, and shown again
    assert capsys.readouterr().out == out
    assert cli.main([*command, "--seed", "1"]) == 2
    assert "holds a run with other settings: seed was 0 and is now 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ViT-B-32/openai"], "--model needs IMAGE and --hook"),
        (["--n-images", "0"], "--n-images takes a positive number"),
        (["--architecture", "topkk"], "did you mean 'topk'"),
        (["--normalize", "all"], "normalize_activations must be one of"),
        (["--hook", "blocks.9.hook_resid_post"], "no hook matches"),
        (["--hook", "blocks.0.hook_resid_post", "--hook", "blocks.0.hook_resid_post"], "must be different hooks"),
        (["nowhere.png"], "nowhere.png"),
    ],
)
def test_train_sae_with_wrong_input(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train-sae", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
