"""``python -m cmkd_scale`` is the program ``cmkd``, so that launchers can start it."""

from cmkd_scale.cli import program

if __name__ == "__main__":
    program()
