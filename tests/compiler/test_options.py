"""Options and settings: precedence, types, documentation."""

from __future__ import annotations

import threading

import plait
import pytest
from plait import config, errors
from plait.compiler.options import MODES, Options, describe
from plait.passes.prune import Prune


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Options.of().verify == "off"
    with config.patch(verify="structure", disable_passes=["share"]):
        assert Options.of().verify == "structure" and Options.of().disable_passes == ("share",)
        monkeypatch.setenv("PLAIT_VERIFY", "each-pass")
        assert config.current().verify == "each-pass", "the environment wins over plait.config"
        assert Options.of({"verify": "off"}).verify == "off", "options win over the environment"
        assert Options.of({"mode": "max-autotune"}, mode="default").mode == "default", "arguments win over options"
    assert config.current().disable_passes == ()


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.UnknownSetting, match="'verfy', did you mean 'verify'"):
        config.configure(verfy="off")
    with pytest.raises(errors.BadSetting, match="verify must be off or structure"), config.patch(verify="no"):
        pass
    monkeypatch.setenv("PLAIT_BISECT_LIMIT", "many")
    with pytest.raises(errors.BadSetting, match="PLAIT_BISECT_LIMIT must be a whole number"):
        config.current()
    monkeypatch.setenv("PLAIT_BISECT_LIMIT", "7")
    assert config.current().bisect_limit == 7


def test_configure_holds_everywhere_and_patch_only_here() -> None:
    seen = {}

    def look(name: str) -> None:
        seen[name] = config.current().dump_dir

    try:
        config.configure(dump_dir="a")
        with config.patch(dump_dir="b"):
            look("here")
            thread = threading.Thread(target=look, args=("there",))
            thread.start()
            thread.join()
    finally:
        config.configure(dump_dir=None)
    assert seen == {"here": "b", "there": "a"} and config.current().dump_dir is None


def test_everything_is_documented() -> None:
    for name, env, _, doc in config.describe():
        assert env == f"PLAIT_{name.upper()}" and doc
    assert len(config.describe()) <= 12
    for _, _, doc in describe():
        assert doc


def test_modes_and_unknown_names() -> None:
    for mode in MODES:
        assert Options.of(mode=mode).mode == mode
    assert Options.of(mode="max-autotune").tune and not Options.of().tune
    with pytest.raises(errors.UnknownMode, match="'turbo'"):
        Options.of(mode="turbo")
    with pytest.raises(errors.UnknownOption, match=r"did you mean 'fold\.max_elements'"):
        Options.of({"fold_max_elements": 3})
    with pytest.raises(errors.UnknownPassOption, match="'max_element'"):
        Options.of({"fold.max_element": 3})
    with pytest.raises(errors.UnknownOption):
        Options.of({"pass_options": ()})


def test_passes_by_object_name_text_and_mapping() -> None:
    given = [Prune(), "prune", "fold:max_elements=4", {"name": "fold", "max_elements": 5}]
    found = Options.of({"passes": given}).passes
    assert [p.name for p in found] == ["prune", "prune", "fold", "fold"]
    assert [p.options().get("max_elements") for p in found[2:]] == [4, 5]
    assert Options.of({"passes": "prune"}, passes=["fold"]).passes[1].name == "fold"
    with pytest.raises(errors.BadOption, match="passes"):
        Options.of({"passes": [{"max_elements": 4}]})
    with pytest.raises(errors.BadOption, match="freeze"):
        Options.of({"freeze": "perhaps"})
    assert Options.of({"disable_passes": "fold, share"}).disable_passes == ("fold", "share")


def test_the_public_face() -> None:
    assert {"compile", "explain", "observe", "load", "config", "debugging", "errors", "ir"} <= set(plait.__all__)
    for name in plait.__all__:
        assert getattr(plait, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'kompile'"):
        plait.kompile  # noqa: B018
