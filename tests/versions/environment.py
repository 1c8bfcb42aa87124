"""Make an environment with some other versions: the rest is that of the Python that runs this.

    python tests/versions/environment.py DIRECTORY [OPTIONS OF PIP INSTALL]

What is installed into it comes first on its path, so torch is on the disk once.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    """Make it anew."""
    directory, *options = sys.argv[1:]
    # PYTHONPATH would show packages to pip that this environment won't see.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = Path(directory) / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install.append("--no-compile")  # most of it is never imported
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    subprocess.run([*install, *options], check=True, env=environment)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(directory) / "lib" / version / "site-packages" / "rest.pth").write_text(line)


if __name__ == "__main__":
    main()
