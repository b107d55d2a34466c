"""dev.py: which environment is trusted, what is run, what is said when something fails. Nothing is installed here."""
import json
import re
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import dev
from tools import store_outputs

ROOT = Path(__file__).resolve().parents[1]
CHECK_TORCH = dev.check_torch


@pytest.fixture
def course(tmp_path, monkeypatch):
    """dev.py in an empty folder, with every command replaced: what was asked for is in `.calls`."""
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    (tmp_path / "colab-constraints.txt").write_text("torch==2.11.0\n", encoding="utf-8")
    fake = SimpleNamespace(path=tmp_path, calls=[], failing=None, version="{}.{}".format(*sys.version_info))

    def run(command, env=None):
        fake.calls.append(command)
        if "venv" in command:
            dev.env_python().parent.mkdir(parents=True, exist_ok=True)
            dev.env_python().touch()
            dev.stamp_file().unlink(missing_ok=True)
        return 1 if fake.failing and fake.failing in command else 0

    monkeypatch.setattr(dev, "HERE", tmp_path)
    for name, value in (("ENV", tmp_path / ".venv"), ("CONSTRAINTS", dev.CONSTRAINTS), ("EXTRAS", dev.EXTRAS),
                        ("TORCH", None)):
        monkeypatch.setattr(dev, name, value)   # use_colab() changes them: all are put back after each test
    monkeypatch.setattr(dev, "run", run)
    monkeypatch.setattr(dev, "check_torch", lambda: None)
    monkeypatch.setattr(dev, "usable_version", lambda python: fake.version)
    return fake


def made(course):
    """The kinds of command since the last look."""
    kinds = ["venv" if "venv" in command else "pip" if "pip" in command else "other" for command in course.calls]
    course.calls.clear()
    return kinds


def test_first_call_makes_and_installs_the_second_does_nothing(course):
    dev.set_up()
    assert made(course) == ["venv", "pip"]
    assert not dev.unfinished_note().exists()
    dev.set_up()
    assert made(course) == []


def test_pip_gets_the_constraints_and_every_extra(course):
    dev.set_up()
    pip = course.calls[-1]
    assert pip[:4] == [str(dev.env_python()), "-m", "pip", "install"]
    assert pip[-4:] == ["-c", "constraints.txt", "-e", ".[lab,hub,test,browser,site]"]
    assert not [word for word in pip if "index" in word or "find-links" in word]   # pip's own settings choose the build


def test_reading_installs_less_and_the_tests_add_the_rest(course):
    dev.set_up(dev.READER)
    assert course.calls[-1][-1] == ".[lab,hub]" and made(course) == ["venv", "pip"]
    assert dev.plan(dev.READER)[0] == "nothing" and dev.plan() == (
        "install", "the tests need more packages than reading, so they are added")
    dev.set_up()
    assert course.calls[-1][-1] == dev.EXTRAS and made(course) == ["pip"]
    assert dev.plan(dev.READER)[0] == dev.plan()[0] == "nothing"
    (course.path / "constraints.txt").write_text("torch==2.13.0\nnumpy==99\n", encoding="utf-8")
    dev.set_up(dev.READER)                       # an update leaves nothing out that was there
    assert course.calls[-1][-1] == dev.EXTRAS and dev.plan()[0] == "nothing"


def test_pips_silence_is_counted(course, capsys):
    site = dev.ENV / "lib" / "python3" / "site-packages"
    (site / "old-1.dist-info").mkdir(parents=True)
    with dev.counting_packages(every=0.02):
        time.sleep(0.05)
        (site / "torch-2.13.0.dist-info").mkdir()
        time.sleep(0.2)
    out = capsys.readouterr().out
    assert out == "dev.py: 2 packages are in place, the newest is torch\n"


@pytest.mark.parametrize("verb", ["lab", "test", "shell"])
def test_a_clone_that_cannot_be_written_gets_a_sentence(verb, course, monkeypatch):
    def refuse(*args, **how):
        raise PermissionError(13, "Permission denied", str(course.path / ".venv.unfinished"))
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(SystemExit, match="unfinished cannot be written, .* clone the course where you may write"):
        dev.main([verb])


def test_python_and_shell_are_the_environments(course, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(dev, "run", lambda command, env=None, folder=None: seen.append((command, env, folder)) or 0)
    monkeypatch.setattr(dev, "set_up", lambda extras: seen.append(extras))
    monkeypatch.chdir(tmp_path)
    dev.ENV.mkdir(exist_ok=True)
    for shell in ("/bin/bash", "/usr/bin/fish"):
        monkeypatch.setenv("SHELL", shell)
        assert dev.main(["shell"]) == 0
    assert dev.main(["python", "-m", "lora_edu.record", "--help"]) == 0
    (bash, env, here), (fish, _, _), (python, _, there) = seen[1::2]
    assert bash[:2] == ["/bin/bash", "--rcfile"] and f'PATH="{dev.env_bin()}:$PATH"' in Path(bash[2]).read_text()
    assert fish == ["/usr/bin/fish"] and env["PATH"].startswith(str(dev.env_bin())) and here == there == Path.cwd()
    assert python == [str(dev.env_python()), "-m", "lora_edu.record", "--help"] and seen[::2] == [dev.READER] * 3


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_dependency_file_installs_on_top(course, name):
    dev.set_up()
    with (course.path / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    made(course)
    dev.set_up()
    assert made(course) == ["pip"]
    assert dev.plan()[0] == "nothing"


@pytest.mark.parametrize("failing", ["venv", "pip"])
def test_a_failed_install_is_not_trusted_and_is_made_again(course, failing, capsys):
    course.failing = failing
    with pytest.raises(SystemExit, match="could not make|did not finish"):
        dev.set_up()
    assert dev.plan()[0] == "rebuild"
    course.failing = None
    made(course)
    dev.set_up()
    assert made(course) == ["venv", "pip"]
    assert dev.plan()[0] == "nothing"


def test_a_failed_update_takes_the_trust_away(course):
    """The stamp goes before pip begins: the packages may be half replaced."""
    dev.set_up()
    (course.path / "constraints.txt").write_text("torch==2.13.0\nnumpy==99\n", encoding="utf-8")
    course.failing = "pip"
    with pytest.raises(SystemExit):
        dev.set_up()
    (course.path / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")   # even with the old wishes
    assert dev.plan()[0] == "rebuild"
    dev.unfinished_note().unlink()
    assert dev.plan()[0] == "install"                                                    # and without the note


def test_an_interrupted_install_is_made_again(course, monkeypatch):
    """Stopped at the worst moment: everything is copied, the stamp not written."""
    with monkeypatch.context() as patch:
        patch.setattr(dev, "write_jupyter_settings", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dev.set_up()
    assert dev.plan()[0] == "rebuild"


def test_another_torch_than_the_pinned_one_is_not_trusted(course, monkeypatch):
    def refuse():
        dev.fail("constraints.txt asks for torch 2.13.0")
    monkeypatch.setattr(dev, "check_torch", refuse)
    with pytest.raises(SystemExit):
        dev.set_up()
    assert dev.plan()[0] == "rebuild"


def test_an_environment_without_our_stamp_is_finished(course):
    dev.make_env()
    assert dev.plan()[0] == "install"
    course.version = "3.9"
    assert dev.plan()[0] == "rebuild"
    course.version = None   # no pip, or it does not run
    assert dev.plan()[0] == "rebuild"


@pytest.mark.parametrize("key, value", [("python", "3.10"), ("folder", "elsewhere")])
def test_an_environment_for_another_python_or_place_is_made_again(course, key, value):
    dev.set_up()
    dev.stamp_file().write_text(json.dumps({**dev.wanted(), key: value}), encoding="utf-8")
    todo, why = dev.plan()
    assert todo == "rebuild" and value in why


def test_a_python_that_went_away_is_noticed(course):
    dev.set_up()
    dev.env_python().unlink()
    assert dev.plan()[0] == "rebuild"


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_stamp_is_no_stamp(course, text):
    dev.set_up()
    dev.stamp_file().write_text(text, encoding="utf-8")
    assert dev.plan()[0] == "install"


def test_jupyterlab_setting(course):
    dev.set_up()
    file = course.path / ".venv" / "share" / "jupyter" / "lab" / "settings" / "overrides.json"
    settings = json.loads(file.read_text())
    assert settings["@jupyterlab/apputils-extension:kernels-settings"] == {"commsOverSubshells": "disabled"}
    assert settings["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"


TORCHES = [(["2.13.0+cpu", None, None], "the CPU build"), (["2.13.0", "13.0", None], "the CUDA 13.0 build"),
           (["2.13.0+rocm7", None, "7.0"], "the ROCm 7.0 build")]


def answer_with(monkeypatch, tmp_path, returncode, stdout, stderr=""):
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\ntorch==2.13.0\n", encoding="utf-8")
    monkeypatch.setattr(dev, "HERE", tmp_path)
    monkeypatch.setattr(dev.subprocess, "run", lambda *a,
                        **k: subprocess.CompletedProcess(a, returncode, stdout, stderr))


@pytest.mark.parametrize("reply, build", TORCHES)
def test_torch_is_named_with_its_build(reply, build, monkeypatch, tmp_path, capsys):
    answer_with(monkeypatch, tmp_path, 0, "a warning\n" + json.dumps(reply))
    dev.check_torch()
    assert f"torch {reply[0]}, {build}" in capsys.readouterr().out


def test_the_wrong_torch_is_refused(monkeypatch, tmp_path):
    answer_with(monkeypatch, tmp_path, 0, json.dumps(["2.12.1+cu130", "13.0", None]))
    with pytest.raises(SystemExit, match=r"asks for torch 2\.13\.0, and pip installed 2\.12\.1\+cu130"):
        dev.check_torch()


def test_a_torch_that_does_not_import_is_refused(monkeypatch, tmp_path):
    answer_with(monkeypatch, tmp_path, 1, "", "OSError: libsomething.so")
    with pytest.raises(SystemExit, match="libsomething"):
        dev.check_torch()


def test_test_runs_pytest_with_nbval_on_the_cpu_and_hands_arguments_on(course, monkeypatch):
    seen = []
    monkeypatch.setattr(dev, "set_up", lambda: None)
    monkeypatch.setattr(dev, "run", lambda command, env: seen.append((command, env)) or 3)
    assert dev.main(["test", "-x", "-k", "rank", "tests/lora"]) == 3
    (command, env), = seen
    assert command[1:7] == ["-m", "pytest", "-x", "-k", "rank", "tests/lora"]
    assert {"--nbval", "--nbval-current-env"} < set(command) and "-n" not in command, "a choice runs in one process"
    assert env["LORA_EDU_DEVICE"] == "cpu"
    assert env["PATH"].startswith(str(dev.env_bin()))


@pytest.mark.parametrize("options, notebooks", [([], True), (["--full"], True), (["--quick"], False)])
def test_a_whole_run_is_shared_by_workers_of_one_thread(course, monkeypatch, options, notebooks):
    seen = []
    monkeypatch.setattr(dev, "set_up", lambda: None)
    monkeypatch.setattr(dev, "run", lambda command, env: seen.append((command, env)) or 0)
    monkeypatch.setattr(dev, "colab", lambda more: 0)
    monkeypatch.setattr(dev.os, "cpu_count", lambda: 2)
    assert dev.main(["test", *options]) == 0
    (lint, _), (command, env) = seen
    assert lint[1:] == ["-m", "ruff", "check", "--no-cache", str(course.path)], "a second, before the minutes"
    assert command[-5:] == ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"] and env["OMP_NUM_THREADS"] == "1"
    assert ("--nbval" in command) == notebooks and set(options) < set(command)


@pytest.mark.parametrize("options", [[], ["--quick"], ["--full"], ["-k", "rank"]])
def test_a_whole_run_ends_where_ruff_has_something_to_say(course, monkeypatch, options):
    seen = []
    monkeypatch.setattr(dev, "set_up", lambda: None)
    monkeypatch.setattr(dev, "run", lambda command, env: seen.append(command) or 1)
    assert dev.main(["test", *options]) == 1
    (command,) = seen
    assert ("ruff" in command) == ("-k" not in options)


@pytest.fixture
def with_bundle(course, monkeypatch):
    """tools/bundle.py is not run: two notebooks and a wheel of nothing lie where it would put them."""
    whole = dev.run

    def run(command, env=None, folder=None):
        if "bundle.py" in str(command):
            with zipfile.ZipFile(Path(command[-1]) / "x.zip", "w") as zipped:
                for name in ("00_a", "01_b", "02_c"):
                    zipped.writestr(f"notebooks/{name}.ipynb", "{}")
        course.environments.append(env)
        return whole(command, env)
    course.environments = []
    monkeypatch.setattr(dev, "run", run)
    return course


def test_colab_runs_the_bundle_in_an_environment_without_the_package(with_bundle, monkeypatch):
    course = with_bundle
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LORA_EDU_SOURCE", "somewhere")
    dev.set_up()
    ours = dev.env_python()
    assert made(course) == ["venv", "pip"]
    assert dev.main(["colab", "-x"]) == 0
    venv, pip, bundle, away, first, rest = course.calls
    assert venv[-1] == str(course.path / ".venv-colab") and str(dev.env_python()).startswith(venv[-1])
    assert pip[0] == str(dev.env_python()) != str(ours) and "-e" not in pip
    assert pip[5:7] == ["-r", str(course.path / ".venv-colab" / "requirements.txt")]
    assert Path(pip[6]).read_text(encoding="utf-8") == "torch==2.11.0\n"
    assert bundle[1].endswith("bundle.py") and away[-3:] == ["--quiet", "--yes", "lora-edu"] and "uninstall" in away
    for command, names in ((first, ["01_b.ipynb"]), (rest, ["00_a.ipynb", "02_c.ipynb"])):
        assert command[:3] == [str(dev.env_python()), "-m", "pytest"] and command[-1] == "-x"
        assert {"--nbval", "--nbval-current-env", "--nbval-cell-timeout=600"} < set(command)
        books = [Path(part) for part in command if part.endswith(".ipynb")]
        assert [book.name for book in books] == names and not any(book.is_relative_to(ROOT) for book in books)
    env = course.environments[-1]
    assert env["LORA_EDU_DEVICE"] == "cpu" and env["PIP_NO_INDEX"] == "1"
    assert env["PATH"].startswith(str(course.path / ".venv-colab"))
    assert not {"PYTHONPATH", "LORA_EDU_SOURCE"} & set(env)
    assert ours.exists() and not (course.path / ".venv-colab.unfinished").exists()


@pytest.mark.parametrize("failing, calls", [("01_b.ipynb", 1), ("02_c.ipynb", 2), (None, 2)])
def test_a_notebook_that_fails_gives_its_status(failing, calls, with_bundle, monkeypatch):
    whole = dev.run
    monkeypatch.setattr(dev, "run", lambda command, *more: whole(command, *more)
                        or 3 * (failing is not None and failing in str(command)))
    monkeypatch.delenv("CI", raising=False)
    assert dev.main(["colab"]) == (3 if failing else 0)
    assert sum("pytest" in command for command in with_bundle.calls) == calls


def test_real_runs_its_tool_in_a_readers_environment(course):
    assert dev.main(["real"]) == 0
    assert course.calls[-1][-1].endswith("real.py") and ".[lab,hub]" in str(course.calls)


def test_the_labs_are_looked_at_in_colabs_front_end_last(with_bundle, monkeypatch):
    """With the driver of .venv; where there is none, a line says so, and under CI it is an error."""
    monkeypatch.setenv("CI", "true")
    assert dev.main(["colab"]) == 1
    (with_bundle.path / ".venv" / "lib" / "python3.11" / "site-packages" / "playwright").mkdir(parents=True)
    assert dev.main(["colab"]) == 0
    python, script, program, books = with_bundle.calls[-1]
    assert python.startswith(str(with_bundle.path / ".venv")) and script.endswith("classic.py")
    assert ".venv-colab" in program and Path(books).name == "notebooks"
    dev.main(["colab", "-k", "one"])
    assert "pytest" in with_bundle.calls[-1], "a choice of tests is only that"


def test_another_torch_and_all_else_colabs(with_bundle, monkeypatch):
    dev.main(["colab", "--torch", "2.13.0", "-x"])
    assert (with_bundle.path / ".venv-colab" / "requirements.txt").read_text(encoding="utf-8") == "torch==2.13.0\n"
    assert with_bundle.calls[-1][-1] == "-x" and "--torch" not in with_bundle.calls[-1]
    assert dev.plan()[0] == "nothing"
    dev.use_colab()
    assert dev.plan()[0] == "install"


def test_a_full_run_ends_with_colabs_and_a_failed_one_before_it(course, monkeypatch):
    asked, status = [], 0
    monkeypatch.setattr(dev, "set_up", lambda: None)
    monkeypatch.setattr(dev, "run", lambda command, env: status)
    monkeypatch.setattr(dev, "colab", lambda more: asked.append(more) or 5)
    assert dev.main(["test", "--full"]) == 5 and asked == [["--torch", "2.13.0"]]
    status = 2
    assert dev.main(["test", "--full"]) == 2 and dev.main(["test"]) == 2 and len(asked) == 1


def test_bundle_writes_into_dist(course):
    assert dev.main(["bundle"]) == 0
    assert course.calls[-1] == [str(dev.env_python()), str(course.path / "tools" / "bundle.py"),
                                str(course.path / "dist")]


@pytest.mark.parametrize("name, todo", [("constraints.txt", "nothing"), ("colab-constraints.txt", "install"),
                                        ("pyproject.toml", "install")])
def test_the_colab_stack_is_made_anew_when_its_own_files_change(with_bundle, name, todo):
    course = with_bundle
    dev.main(["colab"])
    with (course.path / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert dev.plan()[0] == todo
    made(course)
    dev.main(["colab"])
    run = ["other", "pip", "other", "other"]        # bundle, uninstall, the first notebook, the others
    assert made(course) == (run if todo == "nothing" else ["pip", *run])


def test_the_colab_stack_asks_for_its_own_torch(course, monkeypatch):
    monkeypatch.setattr(dev, "check_torch", CHECK_TORCH)
    answer_with(monkeypatch, course.path, 0, json.dumps(["2.13.0+cpu", None, None]))
    with pytest.raises(SystemExit, match=r"colab-constraints\.txt asks for torch 2\.11\.0, and pip installed "
                       r"2\.13\.0\+cpu"):
        dev.main(["colab"])
    assert dev.unfinished_note().name == ".venv-colab.unfinished" and dev.plan()[0] == "rebuild"


def test_help_is_printed_without_a_verb(capsys):
    assert dev.main([]) == 0
    out = capsys.readouterr().out
    verbs = ("lab", "python", "shell", "test", "notebooks", "links", "bundle", "colab")
    assert [verb for verb in verbs if f"python dev.py {verb}" not in out] == []


def test_an_unknown_verb_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        dev.main(["frobnicate"])
    assert end.value.code == 2 and "frobnicate" in capsys.readouterr().err


def test_only_the_standard_library():
    """Before anything is installed, dev.py and the module it imports must run."""
    for name in ("dev.py", "tools/links.py", "tools/copies.py"):
        found = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        # lora_edu and google.colab: in the setup cell
        assert set(found) - {"tools"} - sys.stdlib_module_names - {"lora_edu", "google"} == set(), name


def test_an_old_python_is_told_so():
    """The check comes before anything that an older Python cannot import."""
    code = ("import sys, runpy; sys.version_info = (3, 9, 1); sys.argv = ['dev.py', 'lab'];sys.modules['tomllib'] = "
            "None; runpy.run_path('dev.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Python 3.11 or newer is needed" in done.stderr


def test_ports():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(SystemExit, match=f"port {busy.getsockname()[1]} is in use"):
            dev.free_port(busy.getsockname()[1])
    assert 8888 <= dev.free_port() < 8988


SERVER = """
import http.server, os, sys
port = [int(word.split("=")[1]) for word in sys.argv if word.startswith("--ServerApp.port=")][0]
print("token", len(os.environ["JUPYTER_TOKEN"]), *sys.argv[1:], flush=True)
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.server.running = False
    def log_message(self, *args): ...
server = http.server.HTTPServer(("127.0.0.1", port), Page)
server.handle_request()
"""


@pytest.mark.parametrize("exists, page", [(True, "/lab/tree/notebooks/00_start_here.ipynb"), (False, "/lab")])
def test_lab_prints_the_address_once_the_server_answers(course, monkeypatch, capfd, exists, page):
    """A small server in JupyterLab's place, which answers once and ends."""
    (course.path / "jupyterlab.py").write_text(SERVER, encoding="utf-8")
    (course.path / "notebooks").mkdir()
    if exists:
        (course.path / "notebooks" / "00_start_here.ipynb").touch()
    (course.path / "README.md").touch()
    monkeypatch.setattr(dev, "set_up", lambda extras: None)
    monkeypatch.setattr(dev, "env_python", lambda: sys.executable)
    port = dev.free_port()
    assert dev.main(["lab", "--no-browser", "--port", str(port)]) == 0
    out = capfd.readouterr().out
    assert re.search(rf"http://127\.0\.0\.1:{port}{page}\?token=[0-9a-f]{{32}}\n", out)
    assert f"--ServerApp.root_dir={course.path / 'my_notebooks'}" in out
    assert (course.path / "my_notebooks" / "notebooks" / "00_start_here.ipynb").exists() == exists
    assert "--no-browser" in out and f"--LabApp.default_url={page}" in out and "token 32" in out
    # in the address only, not on the command line that others can read
    assert len(re.findall(r"[0-9a-f]{32}", out)) == 1


def test_a_lab_that_does_not_start_ends_with_its_status(course, monkeypatch, capfd):
    (course.path / "jupyterlab.py").write_text("raise SystemExit(7)", encoding="utf-8")
    (course.path / "README.md").touch()
    monkeypatch.setattr(dev, "set_up", lambda extras: None)
    monkeypatch.setattr(dev, "env_python", lambda: sys.executable)
    assert dev.lab() == 7
    assert "JupyterLab is at" not in capfd.readouterr().out


def test_a_child_does_not_outlive_dev(tmp_path):
    """SIGTERM to dev.py takes the child along (a closed terminal, a cancelled job)."""
    code = ("import signal, sys, dev; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));dev.run([sys.executable, "
            "'-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'])")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.terminate()
    assert parent.wait(10) == 143
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(child):
        time.sleep(0.05)
    assert not alive(child)


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    if Path("/proc/self").exists():
        return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return subprocess.run(["ps", "-p", str(pid)], capture_output=True).returncode == 0


# -- python dev.py notebooks -------------------------------------------------------------------------------------------

def notebook(path, *sources):
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": text, "outputs": [],
              "execution_count": None}
             for i, text in enumerate(sources)]
    path.write_text(json.dumps({"cells": cells, "metadata": {"accelerator": "GPU"}, "nbformat": 4,
                                "nbformat_minor": 5}))
    return path


def test_outputs_are_stored_clean(tmp_path):
    path = notebook(tmp_path / "01_one.ipynb", "import os\nprint(os.path.basename(os.getcwd()))",
                    "import ipywidgets\nipywidgets.IntSlider(3)", "import sys\nsys.executable")
    assert store_outputs.store(path) is None
    stored = json.loads(path.read_text(encoding="utf-8"))
    cells = stored["cells"]
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3]
    assert cells[0]["outputs"][0]["text"] == [f"{tmp_path.name}\n"]               # it runs in its own folder
    assert "IntSlider" in "".join(cells[1]["outputs"][0]["data"]["text/plain"])
    assert "".join(cells[2]["outputs"][0]["data"]["text/plain"]) == repr(sys.executable)   # and on this Python
    assert set(stored["metadata"]) == {"kernelspec", "language_info", "accelerator"}
    assert stored["metadata"]["language_info"] == {"name": "python"}
    assert [cell["metadata"] for cell in cells] == [{}, {}, {}]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failing_cell_is_named_and_the_file_stays(tmp_path):
    path = notebook(tmp_path / "01_one.ipynb", "x = 1", "y = x / 0", "print(x)")
    before = path.read_bytes()
    problem = store_outputs.store(path)
    assert problem == "code cell 2 of 3 (y = x / 0) raised ZeroDivisionError: division by zero"
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("names, want", [([], ["00_a", "01_b"]), (["01"], ["01_b"]), (["00_a"], ["00_a"]),
                                         (["notebooks/01_b.ipynb"], ["01_b"]),
                                         (["the_memory"], ["05_the_memory_bill"]),
                                         (["Memory"], ["05_the_memory_bill"])])
def test_notebooks_are_found_by_number_name_a_part_of_it_and_path(tmp_path, names, want):
    for name in ("00_a", "01_b", *(["05_the_memory_bill"] if names and "emory" in names[0] else [])):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in store_outputs.find(names, tmp_path)] == want


def test_an_unknown_notebook_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="no notebook is called '07'"):
        store_outputs.find(["07"], tmp_path)
    assert store_outputs.main(["no such notebook"]) == 1
    assert "no such notebook" in capsys.readouterr().out
