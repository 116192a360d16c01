"""The bus: the only code that imports nats or nkeys. Import from the module that has what you need.

connection   Bus: connect, publish, request, subscribe, queue (bounded), listen, flush, close; `bus.js`
jetstream    JetStream: api, stream_info, last_message, publish; StreamNames
reader       StreamReader (ordered, own cursor, follows or ends), BucketWatcher, read_bucket (KV)
streams      setup_streams, check_streams, wait_for_streams
sites        collect, forward_commands (leaf nodes)   confined     ask: as a user who may not ask everything
consumer     CommandConsumer, Delivery           outbox       OutboxPublisher; recovery: decide(), pure
chunks       ChunkPublisher, StoredChunk         rpc          serve_queries, query
presence     Presence                            permissions  the contract's permission lists as data
server       EmbeddedServer                      failures     what the bus raises

Behind these: dial, probe, credentials, wire, replies, subscription (the connection); batches
(the outbox); delivery (the consumer); window (chunks); messages (wire details).

Nothing is imported here, so that a program that needs no NATS does not pay for it.
"""
