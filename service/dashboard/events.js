// The service's events, read with fetch(), as EventSource cannot send a key. The stream is opened again after whatever
// ends it, sooner after the first failure than after the tenth, and closed while nobody sees the page: a browser opens
// six connections to a host, and an open stream takes one of them.

import { headers } from "./page.js";

const SILENT_MS = 5000; // an event comes every second: after this long without one the service is gone
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10000;

/** An answer to the request for events that has none. */
export class Refused extends Error {
  constructor(response, detail) {
    super(detail);
    this.response = response;
  }
}

/**
 * Follows the events for ever.
 *
 * onEvent(kind, data) is called for each, and onLost(error) whenever the stream has ended and is going to be opened
 * again. It returns a function that opens it at once.
 */
export function follow(onEvent, onLost) {
  let wait = FIRST_WAIT_MS;
  let wake = () => {};
  let leave = () => {};

  async function read() {
    const controller = new AbortController();
    leave = () => controller.abort();
    let timer;
    const listen = () => {
      clearTimeout(timer);
      timer = setTimeout(() => controller.abort(new Error("it has been silent for too long")), SILENT_MS);
    };
    try {
      listen();
      const response = await fetch("events", { headers: headers(), signal: controller.signal, cache: "no-store" });
      if (!response.ok) throw new Refused(response, (await response.json()).detail);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) throw new Error("it has ended the connection");
        listen();
        const events = (text + value).split("\n\n");
        text = events.pop();
        for (const event of events) {
          const [, kind, data] = event.match(/^event: (.*)\ndata: (.*)$/);
          onEvent(kind, JSON.parse(data));
          wait = FIRST_WAIT_MS;
        }
      }
    } finally {
      clearTimeout(timer);
      controller.abort();
    }
  }

  async function run() {
    for (;;) {
      if (document.hidden) await new Promise((resolve) => (wake = resolve));
      try {
        await read();
      } catch (error) {
        if (document.hidden) continue;
        onLost(error);
      }
      // Pages that lost the same service do not all come back in the same moment.
      const pause = wait * (0.75 + Math.random() / 2);
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
      await new Promise((resolve) => {
        wake = resolve;
        setTimeout(resolve, pause);
      });
    }
  }

  const again = () => {
    wait = FIRST_WAIT_MS;
    wake();
  };
  document.addEventListener("visibilitychange", () => (document.hidden ? leave() : again()));
  run();
  return again;
}
