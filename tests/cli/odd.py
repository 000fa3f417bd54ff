"""Odd things to give a command: values by type, names, folders, models and adapters that are broken."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

INTEGERS = ("-1", "0", "1", "7", "2147483648", "9223372036854775808", "1" + "0" * 40, "1e3", "", "nan", "１２", "1_000")
FLOATS = ("nan", "inf", "-inf", "-1", "0", "1e308", "1e999", "", "x", "1e-320")
# "\udce9" stands for the byte 0xE9, which is no UTF-8. No name leads out of the place of a call, because a command may
# make or close what it is told to: commands run two folders deep, and "/" is not among the names.
NAMES = (
    *("", " ", "[red]x[/red]", "[/]", "a[b", "\x1b[31mred", "\x1b]0;title\x07", "new\nline", "caf\udce9", "%s%n", "{}"),
    *("what?", "🙂", "\u202egnp", "x" * 300, "x" * 100_000, "-1", "--", "~", ".", "..", "../x", "none", "null"),
)
TEXTS = (
    *NAMES,
    *(
        "http://host",
        "127.0.0.1:1",
        "127.0.0.1:99999",
        "unix:/nope",
        "unix:",
        ":",
        "a:b:c",
        "[::1]:1",
        "1,,2",
        "=",
        "m=",
    ),
    *("tova:m=0", "tova:m=-1", "tova:m=999999999999", "tova:m=8,m=8", "yarn:0", "yarn:nan", "yarn:1e9", "chunks=-1"),
    *("tova:m=N", "homer:m=8,leaf=0", "icae:adapter=/nope", "10" * 30 + "d", "0s", "random:tiny", "random:", "cuda:99"),
)


def folders(place: Path) -> list[str]:
    """Paths that are odd: missing, files, links in a circle, devices, and names that few expect."""
    made = []
    for number, name in enumerate(NAMES):
        if not name or "/" in name or len(name) > 250 or name in (".", "..", "~"):
            made.append(name)
            continue
        path = place / "folders" / name
        path.parent.mkdir(exist_ok=True)
        if number % 2:
            path.mkdir()
        else:
            path.write_bytes(b"caf\xe9 \0 not text" * number)
        made.append(str(path))
    (place / "circle").symlink_to(place / "circle")
    (place / "empty.txt").touch()
    (place / "empty").mkdir()
    os.mkfifo(place / "fifo")
    (place / "odd.jsonl").write_text('{"text": 1}\n[]\n{"text": "\\ud800"}\nnonsense\n')
    (place / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (place / "broken.gz").write_bytes(b"\x1f\x8b\x08\0nonsense")
    names = ("circle", "empty.txt", "empty", "fifo", "odd.jsonl", "broken.safetensors", "broken.gz", "missing/deep/x")
    return [*made, *(str(place / name) for name in names), "/dev/full", "/dev/null", "/proc/self/mem", "/proc/x"]


def models(whole: Path, place: Path) -> list[str]:
    """Copies of a model folder, each broken in one way."""
    return _broken(whole, place / "models", _MODELS)


def adapters(whole: Path, place: Path) -> list[str]:
    """Copies of an ICAE adapter, each broken in one way."""
    return _broken(whole, place / "adapters", _ADAPTERS)


Break = Callable[[Path], object]


def _broken(whole: Path, place: Path, breaks: dict[str, Break]) -> list[str]:
    place.mkdir()
    for name, damage in breaks.items():
        damage(shutil.copytree(whole, place / name))
    return [str(place / name) for name in breaks]


def _nothing(folder: Path) -> None:
    """Make a folder of which only the name is odd."""


def _without(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _cut(name: str, share: float = 0.5) -> Break:
    def cut(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return cut


def _set(name: str, **fields: object) -> Break:
    def change(folder: Path) -> None:
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **fields}))

    return change


def _write(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text)


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_MODELS: dict[str, Break] = {
    "whole": _nothing,
    "[bold]whole[/bold]": _nothing,
    "caf\udce9 whole": _nothing,
    "\x1b[31mwhole\n": _nothing,
    "empty": _empty,
    "config cut": _cut("config.json"),
    "config a list": _write("config.json", "[]"),
    "config no model": _write("config.json", "{}"),
    "config of nobody": _write("config.json", '{"model_type": "nobody"}'),
    "config of words": _set("config.json", hidden_size="wide"),
    "config of nothing": _set("config.json", num_hidden_layers=0),
    "config with other heads": _set("config.json", num_attention_heads=3),
    "config larger": _set("config.json", hidden_size=64),
    "config with odd rope": _set("config.json", rope_parameters={"rope_type": "nobody"}),
    "config that wants code": _set("config.json", auto_map={"AutoConfig": "code.Config"}, model_type="own"),
    "weights cut": _cut("model.safetensors"),
    "weights almost whole": _cut("model.safetensors", 0.99),
    "weights empty": _cut("model.safetensors", 0),
    "weights of text": _write("model.safetensors", "a" * 1000),
    "without weights": _without("model.safetensors"),
    "without tokenizer": _without(*_TOKENIZER),
    "tokenizer cut": _cut("tokenizer.json"),
    "tokenizer empty": _write("tokenizer.json", "{}"),
    "tokenizer config cut": _cut("tokenizer_config.json"),
    "tokenizer of nobody": _set("tokenizer_config.json", tokenizer_class="NobodysTokenizer"),
    "generation static": _set("generation_config.json", cache_implementation="static"),
    "generation cut": _write("generation_config.json", '{"do_sam'),
    "generation odd": _set("generation_config.json", num_beams=4, temperature="hot", max_length=1),
    "template that raises": _set("tokenizer_config.json", chat_template="{{ raise_exception('no\n[b]way[/b]') }}"),
    "template that divides": _set("tokenizer_config.json", chat_template="{{ 1 / 0 }}"),
    "template cut": _set("tokenizer_config.json", chat_template="{% for m in"),
    "template without end": _set("tokenizer_config.json", chat_template="{% for i in range(10**9) %}{% endfor %}"),
    "template that says nothing": _set("tokenizer_config.json", chat_template=" "),
    "template of a number": _set("tokenizer_config.json", chat_template=7),
}
_ADAPTERS: dict[str, Break] = {
    "whole": _nothing,
    "[bold]whole[/bold]": _nothing,
    "empty": _empty,
    "config cut": _cut("icae_config.json"),
    "config a list": _write("icae_config.json", "[]"),
    "config of words": _set("icae_config.json", slots="many"),
    "config of nothing": _set("icae_config.json", slots=0, rate=-1),
    "lora config cut": _cut("adapter_config.json"),
    "lora config odd": _set("adapter_config.json", r="x", peft_type="NOBODY"),
    "lora cut": _cut("adapter_model.safetensors"),
    "memory cut": _cut("icae_memory.safetensors"),
    "without memory": _without("icae_memory.safetensors"),
    "without lora": _without("adapter_model.safetensors"),
}
