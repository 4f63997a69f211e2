"""Everything that touches MQTT or access.

Purpose: one seam between the mesh and whatever broker carries it.

- ``broker.session`` is the client side: a connection that survives the broker.
- ``broker.rpc`` puts request, reply and stream on top of it.
- ``broker.access`` is the one table of who may publish and subscribe what, the credentials, and
  the compilers to each broker's own files.
- ``broker.engine`` runs a broker as a child process: ``broker.embedded`` (amqtt, hardened),
  ``broker.mosquitto`` and ``broker.nats`` implement one Protocol and pass one conformance suite.
- ``broker.events`` publishes what components tell about themselves, as CloudEvents.
- ``broker.followed`` keeps what a file of the operator says, and takes up its edits: rules, quotas,
  what attestation asks for.
- ``broker.tenure`` keeps two processes from being one node.
- ``broker.presence`` tells members which routers live.
- ``broker.fair_memory`` bounds what is remembered of clients, without letting one push others out.
- ``broker.replays`` says again what clients have missed, in turns.
- ``broker.lifecycle`` holds ``Service``, from which everything with background work descends.

An engine in use::

    store = CredentialStore(data / "credentials.json")
    password = store.add("pump-7", Role.DEVICE)
    async with EmbeddedBroker(
        settings=EngineSettings(data_dir=data / "broker"), credentials=store, topics=Topics()
    ) as engine:
        print(engine.url)            # mqtt://127.0.0.1:40311
        store.remove("pump-7")
        await engine.reload_access() # its connections are gone
"""
