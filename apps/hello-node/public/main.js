const list = document.getElementById("list");
const answer = document.getElementById("answer");
const field = document.getElementById("name");

async function refresh() {
    const entries = await (await fetch("api/greetings")).json();
    list.replaceChildren(...entries.map(({ name, count }) => {
        const item = document.createElement("li");
        item.textContent = `${name} × ${count}`;
        return item;
    }));
}

document.getElementById("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const reply = await (await fetch(`api/greetings/${encodeURIComponent(field.value)}`, { method: "POST" })).json();
    answer.textContent = reply.greeting ?? reply.error;
    await refresh();
});

refresh();
