"use strict";
const assert = require("node:assert/strict");
const { spawn } = require("node:child_process");
const path = require("node:path");
const test = require("node:test");
const { createApp } = require("../app");

async function serve(t) {
    const entries = [];
    const app = createApp((entry) => entries.push(entry));
    await new Promise((resolve) => app.listen(0, "127.0.0.1", resolve));
    t.after(() => app.server.close());
    t.after(() => app.server.closeAllConnections());
    const base = `http://127.0.0.1:${app.server.address().port}`;
    const call = async (method, where) => {
        const answer = await fetch(base + where, { method });
        return [answer.status, await answer.json()];
    };
    return { base, call, entries };
}

test("greets, counts and lists", async (t) => {
    const { call } = await serve(t);
    assert.deepEqual(await call("POST", "/api/greetings/J%C3%B6rg"), [200, { greeting: "Hello, Jörg!", count: 1 }]);
    assert.deepEqual(await call("POST", "/api/greetings/J%C3%B6rg"), [200, { greeting: "Hello again, Jörg!", count: 2 }]);
    assert.deepEqual(await call("POST", "/api/greetings/Ada"), [200, { greeting: "Hello, Ada!", count: 1 }]);
    assert.deepEqual(await call("GET", "/api/greetings"), [200, [{ name: "Jörg", count: 2 }, { name: "Ada", count: 1 }]]);
});

test("refuses what is no name", async (t) => {
    const { call } = await serve(t);
    for (const name of ["%20", "%FF", "x".repeat(61)]) {
        const [status, body] = await call("POST", `/api/greetings/${name}`);
        assert.equal(status, 400, name);
        assert.match(body.error, /name/);
    }
    assert.deepEqual(await call("GET", "/nowhere"), [404, { error: "nothing at /nowhere" }]);
});

test("serves the page and logs", async (t) => {
    const { base, call, entries } = await serve(t);
    assert.match(await (await fetch(base)).text(), /<h1>Guest book<\/h1>/);
    assert.equal((await call("GET", "/healthz"))[1].status, "ok");
    assert.deepEqual(entries.map(({ method, path, status }) => [method, path, status]), [["GET", "/", 200], ["GET", "/healthz", 200]]);
});

test("stops on SIGTERM", async () => {
    const child = spawn(process.execPath, [path.join(__dirname, "..", "server.js")], { env: { ...process.env, PORT: "0" } });
    child.stdout.once("data", () => child.kill("SIGTERM"));
    assert.deepEqual(await new Promise((resolve) => child.on("exit", (code, signal) => resolve([code, signal]))), [0, null]);
});
