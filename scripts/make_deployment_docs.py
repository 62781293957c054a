"""Writes docs/deployment.md: every key of a deployment file, from the structs that read it. A test compares them."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import msgspec

from transload.deploy import spec
from transload.hardware import parallel

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "deployment.md"
SECTIONS = {
    "model": "ModelSpec",
    "model.precision": "PrecisionSpec",
    "pools (a list)": "Pool",
    "pools[].limits": "Limits",
    "pools[].ffn": "FfnSplit",
    "pools[].parallel": "Parallel",
    "links (a list)": "Link",
    "targets": "Targets",
    "router": "Router",
    "server": "Server",
}
HEAD = """# Deployment files

One YAML file says what runs: model, pools of workers, links, targets. `transload explain FILE` shows what becomes of
it on this machine. Unknown keys, wrong values and what does not fit are refused with the place, the value and the
allowed ones. Sizes are written `4 GiB` or in bytes, durations `200 ms` or in seconds. Any key can be set from the
command line: `--set pools.decode.workers=2`.

A pool with a `chip` is one to simulate (`transload simulate FILE`); without, its workers run on this machine
(`transload serve FILE`).

```yaml
{example}```

(This page is made by `scripts/make_deployment_docs.py` from `src/transload/deploy/spec.py`.)
"""


def field_texts(tree: ast.Module) -> dict[str, dict[str, str]]:
    """The string under each field of each class."""
    texts: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = texts.setdefault(node.name, {})
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = ""
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    text = " ".join(str(following.value.value).split())
                fields[field.target.id] = text
    return texts


def shown_default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory
    return "not set" if value in (None, ()) else f"`{value}`"


def section(title: str, name: str, texts: dict[str, str]) -> str:
    rows = [f"\n## {title}\n", "| key | default | meaning |", "|---|---|---|"]
    for field in msgspec.structs.fields(getattr(spec, name)):
        if isinstance(field.default, msgspec.Struct):
            continue
        rows.append(f"| `{field.encode_name}` | {shown_default(field)} | {texts[field.name].replace('|', ' or ')} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The whole page."""
    texts = {
        name: fields
        for module in (parallel, spec)
        for name, fields in field_texts(ast.parse(Path(str(module.__file__)).read_text())).items()
    }
    example = (ROOT / "deployments" / "2p1d.yaml").read_text()
    parts = [HEAD.format(example=example), *(section(title, name, texts[name]) for title, name in SECTIONS.items())]
    ends = [f"\n## {key}\n\n{texts['Deployment'][key]}\n" for key in ("seed", "assume")]
    return "".join([*parts, *ends])


if __name__ == "__main__":
    TARGET.write_text(page())
    sys.stdout.write(f"wrote {TARGET}\n")
