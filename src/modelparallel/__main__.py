"""`python -m modelparallel`: the command line of the library."""

from modelparallel.launch.command_line import app

if __name__ == "__main__":
    app(prog_name="modelparallel")
