"""A server of one bundle that speaks protocols which many clients know already.

    engine.py       one thread runs the model; the streams of all clients share its calls
    hub.py          what all requests share: engine, limits, keys, whether the server is about to leave
    files.py        HTTP: POST /v1/audio/transcriptions, GET /v1/models, as OpenAI's
    connection.py   what the websockets have in common: admission, timeouts, how they end
    sherpa.py       websocket /sherpa, as sherpa-onnx's streaming server
    vosk.py         websocket /vosk, as Vosk's server
    realtime.py     websocket /v1/realtime, as OpenAI's transcription sessions
    app.py          the routes, and what a load balancer asks
    server.py       listens, and on SIGTERM lets clients finish

A client is hostile until shown otherwise: whatever it sends is bounded in size and time, is never a path or
a command, and can end no other client's stream. Transcripts and audio are not logged.
"""
