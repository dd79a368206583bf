// What every part of the page needs: elements, numbers for people, and the API key.

export const byId = (id) => document.getElementById(id);

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** Changes a text only if it differs: a screen reader speaks at each change. */
export function write(id, text) {
  const target = byId(id);
  if (target.textContent !== text) target.textContent = text;
}

/** With the sign that is as wide as a digit. */
export const minus = (text) => text.replace("-", "\u2212");

const known = (value) => value !== null && value !== undefined;
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
export const count = (value) => (known(value) ? minus(whole.format(value)) : "–");
export const number = (value) => (known(value) ? minus(digits.format(value)) : "–");

/** A number as exact as makes sense beside a spread. */
export function rounded(value, spread) {
  const places = Math.min(Math.max(2 - Math.floor(Math.log10(spread || 1)), 0), 12);
  return minus(new Intl.NumberFormat("en", { maximumFractionDigits: places }).format(value));
}

/** Seconds for people. */
export function duration(seconds) {
  if (seconds < 1) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/** What a request is sent with: the key, where one was given. EventSource could not send it. */
export function headers() {
  const key = sessionStorage.getItem("api-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export function keepKey(key) {
  sessionStorage.setItem("api-key", key);
}

/** Shows the form for a key if an answer says that one is needed. */
export function askForKey(response) {
  byId("key-form").hidden = response.status !== 401;
}
