"""What the verifier says when it refuses a program, cut to the line that matters.

Its log is a trace of every instruction; the reason is the last sentence
before the statistics. The habit is cilium/ebpf's: one line in the message,
the whole log kept beside it.
"""

from __future__ import annotations

import re

from meshbpf.agent.datapath.bpfcall import BpfError

# Lines that end a log without saying why: statistics, register states
# (`R1=ctx() R10=fp0`), instruction traces (`12: (79) r1 = ...`) and
# source positions (`; if (!p)`).
_NOISE = re.compile(
    r"^(processed \d+ insns|verification time|stack depth|max_states|peak_states|mark_read"
    r"|\s*(from \d+ to \d+: )?R\d+(_\w+)?=|\d+: (\([0-9a-f]{2}\)|R\d)|;|func#\d|last_idx"
    r"|regs=|parent |mark_precise:|arg#\d+ reference type|\s*$)"
)


class VerifierError(BpfError):
    """The verifier refused `program`; `log` is all that it said."""

    def __init__(self, program: str, number: int, log: str, reason: str) -> None:
        line = last_useful_line(log) or reason
        super().__init__(
            "bpf-verifier",
            f"program {program} was refused by the kernel: {line}",
            "",
            number=number,
        )
        self.program = program
        self.log = log
        self.line = line


def last_useful_line(log: str) -> str:
    """The reason of a refusal, or "" when the log has none."""
    for line in reversed(log.splitlines()):
        if not _NOISE.match(line):
            return line.strip()
    return ""
