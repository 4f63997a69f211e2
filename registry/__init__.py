"""The registry: admission of claims, the signed catalogue, and search by meaning.

Nodes publish retained claims; the registry checks each (topic, size, form, signature, order),
embeds description and examples itself, keeps catalogue and history in SQLite, and publishes the
admitted record under ``catalog/{node}/{function}``. Of what nodes can do, routers read
nothing else.

Main objects, from pure to wired:

* ``admission.judge``: claim bytes to admitted, unchanged or refused with a reason.
* ``leases.LeaseTable``, ``catalog.Catalog``: what is current, and when it ends.
* ``encoders``: text to unit vectors (``OnnxEncoder`` serves, ``EncoderThread`` keeps it off the
  event loop).
* ``index``: nearest neighbours, exact or by graph; ``lexical``: BM25.
* ``search.CapabilitySearch``: what routers ask; its ``threshold`` is fitted to the catalogue.
* ``store.SqliteStore`` and ``service.RegistryService``: the running registry.

Life cycle::

    async with SqliteStore(path=path) as store, EncoderThread(encoder=load_encoder) as encoder:
        async with RegistryService(session=session, store=store, encoder=encoder, ...) as registry:
            await registry.wait()
"""
