"""What keeps an instance from hurting the agent and its neighbours.

* `limits` says what an instance may take; the child puts most of it on itself
  (`worker.confinement`): resource limits, a private umask, no network (a seccomp filter,
  `worker.seccomp`), all inherited by whatever it starts.
* `cgroup` adds what only a control group can do, where systemd or a container has given us one:
  the memory and the processors of everything an instance started, the number of its processes.
* `strays` finds and ends what an instance leaves behind, wherever that has moved to.
* `folders` gives each instance a folder for temporary files, and sweeps up those of dead agents.
* `environment` is what a child sees of the agent's environment: no secrets.
* `system` finds out, once, what this machine offers, and why it does not offer the rest.

It is a fence against mistakes and runaways. Code of the same user that means harm is not held by
it: it may signal the agent or read its files. For that, run the node as a user of its own.
"""
