"""The house itself: imports point one way, names are there and say what they are, and importing does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clip_lens_ext

ROOT = Path(clip_lens_ext.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
# design.md, section 3: a layer imports layers before it, and siblings of one layer do not import each other. One
# explanation joins attribution and semantics, so it comes after both; plots take it as a result. What is
# known of an SAE and of noise (`noise_*`) joins saes, attribution and spectrum.
LAYERS = [
    {"errors", "provenance", "bootstrap"},
    {"image_files", "result_files"},
    {"image_sources"},
    {"data", "passes", "pass_rows"},
    {"towers"},
    {"saes"},
    {"attribution", "semantics", "spectrum"},
    {"sparse_clip", "planted"},
    {"explanation", "noise_attribution_result", "noise_latents"},
    {"explain", "noise_attribution"},
    {"plots", "report"},
    {"cli_name", "cli_sae", "cli_sparse", "cli_spectrum"},
    {"cli"},
    {"__main__"},
]


def part(path: Path) -> str:
    """The part of the house that a file belongs to: its first folder, or the file itself at the top."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def layer(name: str) -> int:
    found = [index for index, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} has no place in design.md's order: give it one"
    return found[0]


def imported(path: Path) -> set[str]:
    """Parts of the house that a file imports anywhere: at its top, in a function, or for type checking alone."""
    package = ["clip_lens_ext", *path.relative_to(ROOT).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], base]).rstrip(".")
            names = [base] if base.count(".") else [f"{base}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("clip_lens_ext.")}
    return found


@pytest.mark.parametrize(
    "path", [path for path in FILES if path != ROOT / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_one_way(path: Path) -> None:
    own = part(path)
    for other in imported(path) - {own}:
        assert layer(other) < layer(own), f"{path.relative_to(ROOT)} imports {other}"


def test_errors_stand_alone() -> None:
    assert imported(ROOT / "errors.py") == set()


def test_the_check_itself_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "saes").mkdir()
    path = tmp_path / "saes" / "x.py"
    for line in [
        "import clip_lens_ext.cli",
        "from clip_lens_ext.cli import main",
        "from clip_lens_ext import cli",
        "from ..cli import main",
        "from .. import cli",
        "def f():\n    from clip_lens_ext.cli import main",
        "if TYPE_CHECKING:\n    import clip_lens_ext.cli as c",
    ]:
        path.write_text(line)
        assert imported(path) == {"cli"}, line
    path.write_text("from .codes import encode\nfrom . import codes")
    assert imported(path) == {"saes"}


def test_public_names_exist_and_say_what_they_are() -> None:
    assert len(set(clip_lens_ext.__all__)) == len(clip_lens_ext.__all__)
    for name in clip_lens_ext.__all__:
        thing = getattr(clip_lens_ext, name)
        assert (thing.__doc__ or "").strip(), f"{name} has no docstring"
        if callable(thing) and not isinstance(thing, type):
            assert "Example:" in thing.__doc__ or "Args:" in thing.__doc__, name


def test_the_names_of_the_contract_are_public() -> None:
    first = {
        "load_clip",
        "HookedCLIP",
        "HookedTower",
        "load_sae",
        "formats",
        "train_sae",
        "encode",
        "text_target",
        "direction_target",
        "attribution_patching",
        "exact_ablation",
        "logit_lens",
        "activation_energy",
        "random_attribution",
        "faithfulness",
        "collect_references",
        "Vocabulary",
        "align",
        "clarity",
        "polysemanticity",
        "redundancy",
        "monosemanticity",
        "flag_components",
        "StreamingCovariance",
        "collect_covariance",
        "split_noise",
        "subgroup_overlap",
        "prune",
        "fold_pruning",
        "PlantedWorld",
        "planted_clip",
        "planted_sae",
    }
    assert first <= set(clip_lens_ext.__all__)


def test_docstrings_of_modules() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), (
            f"{path.relative_to(ROOT)} has no docstring"
        )


IMPORT = """
import contextlib, io, torch, transformer_lens, sae_lens, open_clip, logging, warnings

def state():
    classes = [torch.nn.MultiheadAttention, torch.nn.LayerNorm, torch.nn.Module, torch.Tensor,
               transformer_lens.HookedRootModule, transformer_lens.hook_points.HookPoint,
               transformer_lens.ActivationCache, sae_lens.SAE, sae_lens.TopKSAE,
               open_clip.transformer.VisionTransformer, open_clip.transformer.Transformer, open_clip.model.CLIP,
               open_clip.transformer.ResidualAttentionBlock]
    modules = [torch, torch.nn.functional, transformer_lens, sae_lens, open_clip, open_clip.factory]
    return [
        [(owner.__name__, name, id(value)) for owner in classes for name, value in sorted(vars(owner).items())
         if name not in ("__abstractmethods__", "_abc_impl")],
        [(owner.__name__, name, id(value)) for owner in modules for name, value in sorted(vars(owner).items())
         if callable(value)],
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_rng_state().tolist(), torch.get_num_threads(),
        logging.root.level, logging.root.manager.disable, len(logging.root.handlers),
        [str(f) for f in warnings.filters],
        torch.backends.mha.get_fastpath_enabled(),
    ]

before = state()
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import clip_lens_ext
after = state()
changed = [(b, a) for b, a in zip(before, after) if b != a]
flat = [pair for b, a in changed if isinstance(b, list) for pair in set(map(str, b)) ^ set(map(str, a))]
own = [str(w.message) for w in caught if "clip_lens_ext" in w.filename]
assert not changed, (flat[:5], changed if not flat else "")
assert out.getvalue() == err.getvalue() == "", (out.getvalue(), err.getvalue())
assert not own, own
print("clean")
"""


def test_importing_prints_nothing_and_patches_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT], capture_output=True, text=True, timeout=240, cwd=ROOT.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "clean"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_one_idea_each(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 330, f"{path.relative_to(ROOT)} is more than one idea"
    for start in ("/work/", "/home/", "/root/", "/tmp/", "/Users/", "C:\\"):
        assert start not in text, f"{path.relative_to(ROOT)} has an absolute path"
