"""One file per queue. Each holds a group, ``Handlers[Services]``, that `mailer.app` includes."""
