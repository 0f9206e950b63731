"""Stands in for Ganeti's node daemon: a request is a line of stdin, carried out by Ganeti's code; so is its answer.

Runs on a node of the tests, on Debian's Python, where Ganeti is installed. It holds nothing between two
requests, and forks for each, as the daemon does. It only calls Ganeti: nothing of what it does is done here.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

# Where Debian puts it, below the directory of its version.
sys.path.insert(0, "/etc/ganeti/share")


def module(name: str) -> Any:
    """A module of Ganeti's, loaded when it is needed."""
    return importlib.import_module(f"ganeti.{name}")


def nic_of(given: dict[str, Any]) -> Any:
    """Ganeti's NIC object."""
    return module("objects").NIC(
        mac=given["mac"],
        ip=given["ip"],
        uuid=given["uuid"],
        nicparams={"mode": given["mode"], "link": given["link"], "vlan": given["vlan"]},
    )


def instance_of(given: dict[str, Any]) -> Any:
    """Ganeti's instance object: its own defaults, but for what the tests need otherwise."""
    constants, objects = module("constants"), module("objects")
    hvparams = {**constants.HVC_DEFAULTS[constants.HT_KVM], **given["hvparams"]}
    beparams = {**constants.BEC_DEFAULTS, **given["beparams"]}
    return objects.Instance(
        name=given["name"],
        uuid=given["uuid"],
        nics=[nic_of(nic) for nic in given["nics"]],
        disks=[],
        disk_template=constants.DT_DISKLESS,
        hypervisor=constants.HT_KVM,
        hvparams=hvparams,
        beparams=beparams,
        osparams={},
        tags=set(),
    )


def start(kvm: Any, instance: Any) -> None:
    kvm.StartInstance(instance, [], False)


def stop(kvm: Any, instance: Any) -> None:
    kvm.StopInstance(instance, force=True)
    kvm.CleanupInstance(instance.name)


def shut_down(kvm: Any, instance: Any) -> None:
    kvm.StopInstance(instance, force=False)


def reboot(kvm: Any, instance: Any) -> None:
    kvm.RebootInstance(instance)


def hot_add(kvm: Any, instance: Any, nic: dict[str, Any]) -> None:
    kvm.HotAddDevice(instance, module("constants").HOTPLUG_TARGET_NIC, nic_of(nic), None, len(instance.nics))


def hot_remove(kvm: Any, instance: Any, nic: dict[str, Any], index: int) -> None:
    kvm.HotDelDevice(instance, module("constants").HOTPLUG_TARGET_NIC, nic_of(nic), None, index)


def migration_info(kvm: Any, instance: Any) -> str:
    return str(kvm.MigrationInfo(instance))


def accept(kvm: Any, instance: Any, info: str, target: str) -> None:
    kvm.AcceptInstance(instance, info, target)


def migrate(kvm: Any, instance: Any, target: str) -> None:
    kvm.MigrateInstance("cluster", instance, target, True)


def migration_status(kvm: Any, instance: Any) -> str:
    return str(kvm.GetMigrationStatus(instance).status)


def finalize_source(kvm: Any, instance: Any, success: bool) -> None:
    kvm.FinalizeMigrationSource(instance, success, True)


def finalize_target(kvm: Any, instance: Any, info: str, success: bool) -> None:
    kvm.FinalizeMigrationDst(instance, info, success)


def running(kvm: Any, instance: Any) -> bool:
    return instance.name in kvm.ListInstances()


def hooks(kvm: Any, instance: Any, after: str) -> list[list[str]]:
    """Run the post hooks of an operation here; returns path, result and output of each, and what Ganeti would log."""
    return run_hooks(instance, after, "post", {})


def pre_hooks(kvm: Any, instance: Any, before: str, more: dict[str, str]) -> list[list[str]]:
    """The same for the hooks before it, which get *more*. Raises what Ganeti raises when one fails."""
    return run_hooks(instance, before, "pre", more)


def run_hooks(instance: Any, operation: str, phase: str, more: dict[str, str]) -> list[list[str]]:
    """Run the hooks of *phase*, as the master asks for it."""
    constants = module("constants")
    nics = [
        (None, nic.uuid, nic.ip, nic.mac, *(nic.nicparams[one] for one in ("mode", "link", "vlan")), None, None)
        for nic in instance.nics
    ]
    environment = module("cmdlib.instance_utils").BuildInstanceHookEnv(
        *(instance.name, "a.example.com", ["b.example.com"], "debian", "up", 128, 128, 1, nics),
        *(constants.DT_DISKLESS, [], instance.beparams, instance.hvparams, constants.HT_KVM, []),
    )
    environment = {key: value for key, value in environment.items() if not key.startswith("INSTANCE_HV_")} | more
    runner = module("backend").HooksRunner()
    words = {constants.HKR_SUCCESS: "success", constants.HKR_FAIL: "failure", constants.HKR_SKIP: "skipped"}
    results: list[list[str]] = []

    def run(nodes: Any, path: str, phase: str, env: dict[str, str]) -> Any:
        found = runner.RunHooks(path, phase, env)
        results.extend([script, words[result], output] for script, result, output in found)
        return dict.fromkeys(nodes, (None, False, found))

    def log(text: str, *arguments: object) -> None:
        results.append(["log", text % arguments if arguments else text])

    code = f"OP_{operation.upper().replace('-', '_')}"
    here = ["a.example.com"]
    master = module("hooksmaster").HooksMaster(
        *(code, operation, (here, here), run, None, lambda: environment, None, log),
        *(constants.HTYPE_INSTANCE, "cluster.example.com", "a.example.com"),
    )
    master.RunPhase(constants.HOOKS_PHASE_PRE if phase == "pre" else constants.HOOKS_PHASE_POST)
    return results


OPERATIONS: dict[str, Callable[..., Any]] = {
    one.__name__: one
    for one in (
        start,
        stop,
        shut_down,
        reboot,
        hot_add,
        hot_remove,
        migration_info,
        accept,
        migrate,
        migration_status,
        finalize_source,
        finalize_target,
        running,
        hooks,
        pre_hooks,
    )
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What Ganeti says to a request: {"operation": …, "instance": {…}, "arguments": {…}}."""
    operation = functools.partial(OPERATIONS[request["operation"]], **request["arguments"])
    try:
        kvm = module("hypervisor.hv_kvm").KVMHypervisor()
        return {"answer": operation(kvm, instance_of(request["instance"]))}
    except module("errors").GenericError as error:
        return {"error": str(error)}


def main() -> None:
    """All requests, one after the other."""
    # As the daemon runs: no terminal, nobody else's files, the root directory.
    os.umask(0o077)
    os.chdir("/")
    out = os.dup(1)
    os.dup2(2, 1)  # what else is said is no answer
    for name in ("objects", "hypervisor.hv_kvm", "backend"):
        module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.write(out, json.dumps(answer(json.loads(line))).encode() + b"\n")
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit("it has not answered")


main()
