from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "pip install -c constraints.txt . && cellprior demo",
    'pip install -c constraints.txt -e ".[test]" && pytest',
)


def blocks(language: str) -> list[str]:
    """The fenced code blocks of the README in one language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_of_the_two_commands_is_a_block_of_its_own_and_ci_runs_it_word_for_word(command):
    assert f"{command}\n" in blocks("bash")
    assert f"run '{command}'\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_command_line_of_the_readme_names_only_commands_that_exist(capsys):
    from cellprior.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    verbs = {line.split()[1] for line in lines if line.startswith("cellprior ")}
    assert verbs == {"list", "card", "check", "embed", "annotate", "evaluate"}
    for verb in verbs:
        assert verb in listed


def test_the_table_of_models_has_every_set_of_weights_that_a_model_reads_with_its_licence():
    import cellprior as cp

    table = cp.weights.available()
    usable = table[(table["kind"] == "model") & (table["support"] != "files only")]
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    assert {name.strip("`"): licence for name, _, _, licence, _ in cells} == usable["licence"].to_dict()
