"use strict";
// The guest book: greets by name and counts the greetings, in memory.

const path = require("node:path");
const polka = require("polka");
const sirv = require("sirv");

const MAX_NAME = 60;
const MAX_NAMES = 1000;

function send(res, status, value) {
    res.writeHead(status, { "Content-Type": "application/json; charset=utf-8", "Cache-Control": "no-store" });
    res.end(JSON.stringify(value));
}

/** One JSON line for each answer on `log`. */
function accessLog(log) {
    return (req, res, next) => {
        const began = process.hrtime.bigint();
        res.on("finish", () => {
            const ms = Number((process.hrtime.bigint() - began) / 1000n) / 1000;
            log({ time: new Date().toISOString(), method: req.method, path: req.path, status: res.statusCode, ms });
        });
        next();
    };
}

function createApp(log = (entry) => console.log(JSON.stringify(entry))) {
    const greetings = new Map();
    const app = polka({
        onNoMatch: (req, res) => send(res, 404, { error: `nothing at ${req.path}` }),
        onError: (error, req, res) => send(res, error.code >= 400 && error.code < 500 ? error.code : 500, { error: error.message }),
    });
    app.use(accessLog(log));
    app.use(sirv(path.join(__dirname, "public"), { etag: true }));

    app.get("/healthz", (req, res) => send(res, 200, { status: "ok", uptime: Math.round(process.uptime()) }));

    app.get("/api/greetings", (req, res) => {
        const list = [...greetings].map(([name, count]) => ({ name, count }));
        send(res, 200, list.sort((a, b) => b.count - a.count || (a.name < b.name ? -1 : 1)));
    });

    app.post("/api/greetings/:name", (req, res) => {
        let name;
        try {
            name = decodeURIComponent(req.params.name).trim();
        } catch {
            return send(res, 400, { error: "the name is not valid UTF-8" });
        }
        if (!name || name.length > MAX_NAME) return send(res, 400, { error: `a name has 1 to ${MAX_NAME} characters` });
        if (!greetings.has(name) && greetings.size >= MAX_NAMES) return send(res, 507, { error: "the guest book is full" });
        const count = (greetings.get(name) ?? 0) + 1;
        greetings.set(name, count);
        send(res, 200, { greeting: count === 1 ? `Hello, ${name}!` : `Hello again, ${name}!`, count });
    });
    return app;
}

module.exports = { createApp };
