"""Serve S3 on loopback with OpenStack Swift, all four of its servers in one process.

Usage: python s3_server.py FOLDER ACCESS_KEY SECRET_KEY
Prints the port on stdout once it answers. Ends when its stdin is closed, so that it never
outlives its caller.

Run it with a Python that has the `swift` package (tests/run.sh makes one). FOLDER must be on a
file system with extended attributes. ACCESS_KEY has the form account:user ("test:tester"), for
that is how Swift's tempauth names its users; Swift does not take the 32 hex digits of R2.
"""

import os
import sys
from pathlib import Path

import eventlet
import eventlet.hubs
import eventlet.wsgi

BACKENDS = ("account", "container", "object")

# mount_check: FOLDER is no mounted disk. fallocate_reserve: write even if the disk is nearly full.
COMMON_SETTINGS = """\
[DEFAULT]
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
workers = 0
log_level = ERROR
bind_ip = 127.0.0.1
bind_port = {port}
"""

BACKEND_CONF = """\
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

# Multipart uploads need slo; the order matters. Each filter has its settings.
FILTERS = {
    "catch_errors": "", "gatekeeper": "", "listing_formats": "",
    "s3api": "location = auto\ns3_acl = no\ncheck_bucket_owner = false\n",
    "tempauth": "user_{account}_{user} = {secret} .admin\n", "bulk": "", "slo": "",
}  # fmt: skip
PROXY_CONF = f"""\
[pipeline:main]
pipeline = {" ".join(FILTERS)} proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
""" + "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n{FILTERS[name]}" for name in FILTERS)


def write_configuration(folder: Path, ports: "dict[str, int]", access: str, secret: str) -> None:
    """Write the configuration files of Swift and of its four servers."""
    (folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
    account, user = access.split(":")
    for kind, port in ports.items():
        own = PROXY_CONF if kind == "proxy" else BACKEND_CONF
        text = (COMMON_SETTINGS + own).format(
            folder=folder, port=port, kind=kind, account=account, user=user, secret=secret
        )
        (folder / f"{kind}-server.conf").write_text(text)


def write_rings(folder: Path, ports: "dict[str, int]") -> None:
    """Write the rings: one partition, one replica, one device."""
    from swift.common.ring import RingBuilder

    for kind in BACKENDS:
        address = {"ip": "127.0.0.1", "port": ports[kind]}
        address |= {"replication_" + key: value for key, value in address.items()}
        builder = RingBuilder(part_power=1, replicas=1, min_part_hours=1)
        builder.add_dev({"region": 1, "zone": 1, "device": "disk", "weight": 1.0, **address})
        builder.rebalance()
        builder.get_ring().save(str(folder / f"{kind}.ring.gz"))


def end_with_stdin() -> None:
    """End this process when its stdin reaches its end."""
    while True:
        eventlet.hubs.trampoline(0, read=True)
        if not os.read(0, 4096):
            os._exit(0)


def main(folder: Path, access: str, secret: str) -> None:
    """Start the servers on free ports and run until stdin is closed."""
    from swift.common import utils, wsgi
    from swift.common.http_protocol import SwiftHttpProtocol

    utils.eventlet_monkey_patch()
    (folder / "devices" / "disk").mkdir(parents=True)
    # The sockets come first: a port that is already bound cannot be taken by anyone else.
    anywhere = ("127.0.0.1", 0)
    sockets = {kind: eventlet.listen(anywhere, backlog=128) for kind in (*BACKENDS, "proxy")}
    ports = {kind: sock.getsockname()[1] for kind, sock in sockets.items()}
    write_configuration(folder, ports, access, secret)
    utils.set_swift_dir(str(folder))
    write_rings(folder, ports)
    for kind, sock in sockets.items():
        app = wsgi.loadapp(str(folder / f"{kind}-server.conf"))
        how = {"protocol": SwiftHttpProtocol, "capitalize_response_headers": False}  # ETag, as is
        eventlet.spawn(eventlet.wsgi.server, sock, app, utils.NullLogger(), **how)
    print(ports["proxy"], flush=True)
    end_with_stdin()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
