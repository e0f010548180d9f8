"""Both clocks jump two days ahead, past the end of every certificate, and back.

Certificates are made anew without anybody asking for it; what counts time in
the kernel (heartbeat, lease) does not notice.
"""

from vagrant.testbed import ECHO, PODS, Testbed, eventually


def run(bed: Testbed) -> None:
    database = PODS["shop/db"]["ipv4"]
    bed.expect_echo("shop/web", database)
    for node in bed.nodes:
        # Somebody who sets the clock right would undo the experiment.
        node.try_run("systemctl stop systemd-timesyncd")
    jumps = ["+172800", "-172800"]
    try:
        while jumps:
            jump = jumps.pop(0)
            for node in bed.nodes:
                node.run(f"date -s @$(( $(date +%s) {jump} ))")
            eventually(
                f"traffic flows {jump} s from then",
                lambda: "error" not in bed.call("shop/web", database, ECHO),
                180,
            )
    finally:
        if jumps:
            for node in bed.nodes:
                node.run(f"date -s @$(( $(date +%s) {jumps[0]} ))")
