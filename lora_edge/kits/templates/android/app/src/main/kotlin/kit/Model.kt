package kit

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtLoraAdapter
import ai.onnxruntime.OrtSession
import java.io.File
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.nio.ShortBuffer

private val KNOWN = setOf("input_ids", "attention_mask", "position_ids", "num_logits_to_keep")

/** The bundle's graph in ONNX Runtime, its adapters and its cache. Not to be used by two threads at once. */
class Model(private val folder: File) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment().also { it.setTelemetry(false) }
    private val session: OrtSession
    private val inputs: List<String>
    private val outputs = setOf(Facts.OUTPUT) + cacheNames("present")

    // A run does not keep its adapter alive.
    private val loaded = mutableListOf<OrtLoraAdapter>()
    private val options = mutableMapOf<String, OrtSession.RunOptions>()

    /** Opens the bundle in a folder; an IllegalStateException where it is not the one that Facts tells of. */
    init {
        val manifest = File(folder, "lora_edge.json")
        check(manifest.isFile) { "$folder has no lora_edge.json: it is no bundle" }
        check(hash(manifest.readBytes()) == Facts.MANIFEST) {
            "$folder is not the bundle that this app was written for; write the project again: " +
                "lora-edge kit BUNDLE android -o FOLDER --force"
        }
        session = environment.createSession(File(folder, Facts.GRAPH).path)
        inputs = session.inputNames.filterNot { it.startsWith("lora.") || it.startsWith("past_key_values.") }
        val odd = inputs.find { it !in KNOWN }
        check(odd == null) { "the graph has the input $odd, which is not fed here" }
    }

    /** The likeliest tokens behind a prompt: [most] at most, without the one that ends the text. Adapters are
     *  switched from call to call. */
    fun generate(prompt: LongArray, adapter: String, most: Int): List<Long> {
        require(prompt.isNotEmpty()) { "the prompt is empty" }
        prompt.find { it < 0 || it >= Facts.VOCABULARY }?.let {
            throw IllegalArgumentException("token $it is not below ${Facts.VOCABULARY}")
        }
        require(Facts.LONGEST == 0 || prompt.size <= Facts.LONGEST) {
            "the prompt has ${prompt.size} tokens, and the model reads ${Facts.LONGEST}"
        }
        val wanted = if (Facts.LONGEST == 0) most else minOf(most, Facts.LONGEST - prompt.size + 1)
        val chosen = found(adapter)
        val start = startOf(chosen.invocation, prompt)
        // Before its invocation, such an adapter changes nothing.
        val then = if (start < prompt.size) adapter else Facts.DEFAULT
        val tokens = mutableListOf<Long>()
        Sequence().use { text ->
            var token = 0L
            if (start > 0) token = text.extend(prompt.copyOfRange(0, start), Facts.DEFAULT)
            if (start < prompt.size) token = text.extend(prompt.copyOfRange(start, prompt.size), then)
            while (tokens.size < wanted && token !in chosen.ends) {
                tokens += token
                if (tokens.size < wanted) token = text.extend(longArrayOf(token), then)
            }
        }
        return tokens
    }

    override fun close() {
        options.values.forEach { it.close() }
        loaded.forEach { it.close() }
        session.close()
    }

    /** A text that grows, with the keys and values of its tokens. */
    private inner class Sequence : AutoCloseable {
        private var length = 0
        private var last: OrtSession.Result? = null

        /** Appends tokens; the likeliest token behind them. */
        fun extend(ids: LongArray, adapter: String): Long {
            val own = mutableMapOf<String, OnnxTensor>()
            try {
                inputs.forEach { own[it] = tensor(it, ids) }
                if (last == null) cacheNames("past_key_values").forEach { own[it] = empty() }
                val fed = if (last == null) own else own + cached()
                val found = session.run(fed, outputs, active(adapter))
                last?.close()
                last = found
            } finally {
                own.values.forEach { it.close() }
            }
            length += ids.size
            val logits = (last!!.get(Facts.OUTPUT).get() as OnnxTensor)
            val numbers = logits.floatBuffer
            val vocabulary = logits.info.shape.last().toInt()
            val first = numbers.limit() - vocabulary
            var best = 0
            for (index in 1 until vocabulary) {
                if (numbers.get(first + index) > numbers.get(first + best)) best = index
            }
            return best.toLong()
        }

        private fun cached(): Map<String, OnnxTensor> =
            cacheNames("past_key_values").associateWith {
                last!!.get(it.replace("past_key_values", "present")).get() as OnnxTensor
            }

        private fun tensor(name: String, ids: LongArray): OnnxTensor {
            val total = length + ids.size
            return when (name) {
                "input_ids" -> whole(ids, 1, ids.size.toLong())
                "attention_mask" -> whole(LongArray(total) { 1 }, 1, total.toLong())
                "position_ids" -> whole(LongArray(ids.size) { (length + it).toLong() }, 1, ids.size.toLong())
                else -> whole(longArrayOf(1)) // the logits of one token are computed
            }
        }

        private fun whole(values: LongArray, vararg shape: Long) =
            OnnxTensor.createTensor(environment, LongBuffer.wrap(values), shape)

        private fun empty(): OnnxTensor {
            val shape = longArrayOf(1, Facts.HEADS, 0, Facts.HEAD_SIZE)
            return if (Facts.HALF) {
                OnnxTensor.createTensor(environment, ShortBuffer.allocate(0), shape, OnnxJavaType.FLOAT16)
            } else {
                OnnxTensor.createTensor(environment, FloatBuffer.allocate(0), shape)
            }
        }

        override fun close() {
            last?.close()
        }
    }

    /** What a run is given so that an adapter is active: ONNX Runtime feeds its file. */
    private fun active(adapter: String): OrtSession.RunOptions =
        options.getOrPut(adapter) {
            val made = OrtSession.RunOptions()
            val file = found(adapter).file
            if (file.isNotEmpty()) {
                loaded += OrtLoraAdapter.create(File(folder, file).path)
                made.addActiveLoraAdapter(loaded.last())
            }
            made
        }

    private fun found(name: String): Adapter =
        requireNotNull(Facts.ADAPTERS.find { it.name == name }) {
            "there is no adapter $name; there are: ${Facts.ADAPTERS.joinToString { it.name }}"
        }
}

private fun cacheNames(what: String): List<String> =
    (0 until Facts.LAYERS).flatMap { listOf("$what.$it.key", "$what.$it.value") }

/** The place from which an adapter is active; the prompt's length: nowhere. */
private fun startOf(invocation: LongArray, prompt: LongArray): Int {
    if (invocation.isEmpty()) return 0
    val places = (prompt.size - invocation.size) downTo 0
    return places.find { prompt.copyOfRange(it, it + invocation.size).contentEquals(invocation) } ?: prompt.size
}

/** FNV-1a of 64 bits, in hexadecimal digits. */
private fun hash(bytes: ByteArray): String {
    var hash = -3750763034362895579L
    for (byte in bytes) hash = (hash xor (byte.toLong() and 0xff)) * 1099511628211L
    return java.lang.Long.toHexString(hash)
}
