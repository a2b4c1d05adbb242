// What is remembered in this browser (`local`) or in this tab (`session`), if it may be.

function store(kind) {
  return {
    get(key) {
      try {
        return window[kind].getItem(key) ?? "";
      } catch {
        return ""; // storage is switched off: nothing was remembered
      }
    },
    set(key, value) {
      try {
        window[kind].setItem(key, value);
      } catch (error) {
        console.info(`not remembered: ${error.message}`);
      }
    },
  };
}

export const local = store("localStorage");
export const session = store("sessionStorage");
