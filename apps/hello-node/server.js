"use strict";
// Starts the guest book on PORT and stops it in good order on SIGTERM and SIGINT.

const { createApp } = require("./app");

const port = Number(process.env.PORT || 8080);
const { server } = createApp().listen(port, "0.0.0.0", (error) => {
    if (error) throw error;
    console.log(JSON.stringify({ event: "listening", port: server.address().port }));
});

for (const signal of ["SIGTERM", "SIGINT"]) {
    process.on(signal, () => {
        console.log(JSON.stringify({ event: "stopping", signal }));
        // Requests under way may finish; idle connections do not keep us.
        server.close(() => process.exit(0));
        server.closeIdleConnections();
        setTimeout(() => process.exit(1), 10_000).unref();
    });
}
