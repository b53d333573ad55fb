"""The command line: one command for each stage, `run` for all of them, `demo` for a first look.

Every command prints one line for each result on stdout. A user's mistake ends in one line on stderr and exit status 2,
Ctrl-C in one line and 130, also while the commands are still being imported: that takes some tenths of a second, and so
it happens in `main`.
"""

import os
import select
import sys
import warnings


def main() -> None:
    """Parse the command line and run the command; the exit status is 0, 1 where `verify` finds damage, 2 for
    a user's mistake, 130 for Ctrl-C, 141 where nobody reads the output any more.
    """
    try:
        from tipl.cli.printing import print_versions, print_warning

        warnings.showwarning = print_warning  # type: ignore[assignment]
        arguments = [argument for argument in sys.argv[1:] if argument != "--quiet"]
        if arguments == ["--version"]:
            print_versions()
            return
        from tipl.cli.commands import parsed
        from tipl.progress import hide_progress

        if arguments != sys.argv[1:]:
            hide_progress()
        parsed(arguments).run()
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print(f"tipl: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, FloatingPointError, MemoryError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(141)  # as a program that SIGPIPE ends
        from tipl.cli.printing import one_line

        print(f"tipl: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _reader_is_gone() -> bool:
    """Return whether nobody reads any more what is printed, as behind `| head`; what is left to print is dropped."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in stdout.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at its end
    return True
