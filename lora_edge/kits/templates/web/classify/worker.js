/** Labels a text; the page stays free meanwhile. */
import { serve } from "./serve.js";

serve({
  async classify(bundle, { text, adapter }) {
    const [labels] = await bundle.classify([text], { adapter });
    return labels;
  },
});
