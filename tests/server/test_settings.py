"""Each setting has a flag, a variable and a row in docs/operations.md."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import typer

import kvbank
from kvbank.console.ending import Failed
from memory_service.cli.serve import serve
from memory_service.settings import Settings, SettingsError, load, unknown_variables
from tests.support.service_process import ServiceHost

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_every_setting_is_documented_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `--([\w-]+)` \| `(\w+)` \| (\S*) \| (.+) \|$", TEXT, re.MULTILINE)
    expected = []
    for name, field in Settings.model_fields.items():
        default = (
            "required" if field.is_required() else f"`{field.default}`" if field.default not in ("", ()) else "empty"
        )
        expected.append((name, name.replace("_", "-"), f"KVBANK_{name.upper()}", default, field.description))
    assert rows == expected


Start = Callable[..., tuple[int, str]]


@pytest.fixture
def start(services: ServiceHost, tmp_path: Path) -> Start:
    """`kvbank serve` to its end; on a folder that is a file, so that it ends where the settings are right. The result
    is its exit status, and what it printed."""
    (tmp_path / "file").touch()
    return partial(services.run, "serve", "--data", tmp_path / "file", "--listen", "127.0.0.1:0")


def test_sizes_and_times_are_written_one_way_in_flags_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, text in {"MIN_FREE": "1GiB", "GRACE": "1.5m", "IVF_FROM": "10k", "INDEX_IDLE": "2h"}.items():
        monkeypatch.setenv(f"KVBANK_{variable}", text)
    settings = load({"data": Path(), "max_chunk_bytes": "2.5 MB", "max_answer_bytes": 7})
    assert (settings.min_free, settings.grace, settings.ivf_from, settings.index_idle) == (2**30, 90, 10_000, 7200)
    assert (settings.max_chunk_bytes, settings.max_answer_bytes) == (2_500_000, 7)


def test_a_setting_of_several_values(monkeypatch: pytest.MonkeyPatch, start: Start, tmp_path: Path) -> None:
    both = ("a=b:read", "c=d:write")
    monkeypatch.setenv("KVBANK_TLS_CLIENT", ",".join(both))
    assert load({"data": Path()}).tls_client == both
    monkeypatch.delenv("KVBANK_TLS_CLIENT")
    (tmp_path / "settings.toml").write_text(f"tls_client = {list(both)}")
    assert load({"data": Path()}, file=tmp_path / "settings.toml").tls_client == both
    _, said = start("--tls-client", both[0], "--tls-client", both[1])
    assert "--tls-client needs --tls-client-ca" in said


@pytest.mark.parametrize("text", ["", "x", "-1", "1GiBB", "1 e9", "nan", "inf", "0.5", "1_000", "9" * 30, "1kib", "5s"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^min_free: "):
        load({"data": Path(), "min_free": text})


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "1e9", "1 hour", "5MB", "1h30m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^grace: "):
        load({"data": Path(), "grace": text})


@pytest.mark.parametrize(
    ("flags", "variables", "begin"),
    [
        ({"min_free": "lots"}, {}, "--min-free: 'lots' is not a size"),
        ({}, {"KVBANK_GRACE": "x"}, "KVBANK_GRACE: 'x' is not a time"),
        ({}, {"kvbank_storage_threads": "many"}, "kvbank_storage_threads: "),
        ({"grace": "5s"}, {"KVBANK_GRACE": "x", "KVBANK_MIN_FREE": "y"}, "KVBANK_MIN_FREE: "),
        ({"grace": "z"}, {"KVBANK_GRACE": "5s"}, "--grace: "),
    ],
)
def test_what_is_wrong_is_told_by_the_name_it_was_given_under(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], variables: dict[str, str], begin: str
) -> None:
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(Failed, match=f"^{re.escape(begin)}") as caught:
        serve(data=Path("nowhere"), **flags)
    assert caught.value.code == 2


@pytest.mark.parametrize("data", ["mysql://u:secret@host/db", "s3://bucket/prefix", "POSTGRESQL://host/db"])
def test_a_url_that_is_of_no_database_is_no_folder(data: str) -> None:
    with pytest.raises(
        SettingsError, match=r"^data: [A-Za-z0-9]+:// is no place for data; give a folder, or postg"
    ) as no:
        load({"data": data})
    assert "secret" not in str(no.value)


def test_an_opened_folder_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBANK_MIN_FREE", "lots")
    with pytest.raises(kvbank.InvalidArgument, match=r": KVBANK_MIN_FREE: 'lots' is not a size"):
        kvbank.connect(tmp_path)


def test_a_variable_that_is_no_setting_is_warned_of(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = start(KVBANK_MIN_FRE="1", KVBANK_MEMORY="x:1", KVBANK_API_KEY="k", KVBANK_DEBUG="")
    assert "KVBANK_MIN_FRE is no setting; did you mean KVBANK_MIN_FREE?" in said
    assert "KVBANK_MEMORY" not in said
    assert "KVBANK_API_KEY" not in said
    assert "KVBANK_DEBUG" not in said
    monkeypatch.setenv("KVBANK_TEA", "1")
    assert "KVBANK_TEA is no setting" in list(unknown_variables())


def test_every_setting_has_a_flag() -> None:
    assert inspect.signature(serve).parameters.keys() - {"ready_file", "config"} == Settings.model_fields.keys()


def test_the_help_of_a_flag_is_the_description_of_its_setting() -> None:
    app = typer.Typer()
    app.command()(serve)
    options = {option.name: option for option in typer.main.get_command(app).params}
    for name, field in Settings.model_fields.items():
        assert str(options[name].help).startswith(str(field.description))
    assert str(options["min_free"].help).endswith(" Default: 256MiB.")
    assert str(options["grace"].help).endswith(" Default: 5s.")


def test_a_flag_goes_before_a_variable_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kvbank.toml"
    file.write_text("data = 'memory'\nmin_free = '1GiB'\nstorage_threads = 3\ngrace = 1.5\nmigrate = true\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("kvbank_storage_threads", "4")
    monkeypatch.setenv("KVBANK_GRACE", "20s")
    settings = load({"grace": "7s"}, file=file)
    assert settings.folder == tmp_path.resolve() / "memory"
    assert (settings.min_free, settings.storage_threads, settings.grace) == (2**30, 4, 7)
    assert (settings.migrate, settings.max_banks) == (True, 10_000)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data = 'x'\nmin_free = 'lots'", "min_free: 'lots' is not a size"),
        ("data = 'x'\ngrace = -1", "grace: Input should be greater than or equal to 0"),
        ("data = 'x'\nmin_fre = 1", "min_fre is no setting; did you mean min_free?"),
        ("[data]\nx = 1", "data: "),
        ("data", "it is no TOML: "),
        (b"data = '\xff'", "it is no TOML: "),
    ],
)
def test_what_is_wrong_in_a_file_is_told_by_its_name(tmp_path: Path, text: str | bytes, told: str) -> None:
    file = tmp_path / "kvbank.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Failed, match=f"^{re.escape(f'{file}: {told}')}") as caught:
        serve(config=file)
    assert caught.value.code == 2


def test_a_server_takes_its_settings_from_a_file(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "kvbank.toml"
    file.write_text("metrics_listen = 'unix:/nowhere'\n")
    assert start("--config", file) == (1, "kvbank: metrics are served at HOST:PORT, not on a unix socket\n")
    assert start("--config", tmp_path / "other") == (1, f"kvbank: {tmp_path / 'other'}: No such file or directory\n")
