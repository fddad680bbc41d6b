"""The server that does nothing."""

import httpx

from loadtests.echo import Echo


async def test_it_reads_the_request_and_answers_what_it_was_told_last():
    transport = httpx.ASGITransport(Echo(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://echo") as echo:
        assert (await echo.post("/prioritize", content=b"{}")).status_code == 404
        for reply in (b"[1]", b"[2]"):
            assert (await echo.put("/taught/prioritize", content=reply)).status_code == 200
            assert (await echo.post("/prioritize", content=b'{"NodeNames":["a"]}')).content == reply
        assert (await echo.post("/prioritize", content=b"{")).status_code == 500
