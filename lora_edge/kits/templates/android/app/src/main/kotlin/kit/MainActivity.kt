package kit

import android.app.Activity
import android.content.res.AssetManager
import android.os.Bundle
import android.widget.ArrayAdapter
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.Spinner
import android.widget.TextView
import java.io.File
import java.util.concurrent.Executors

private const val MOST = 64 // new tokens

/** Takes token ids and an adapter, and shows the tokens behind them. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor() // the one thread that the model is used by
    private val model by lazy { Model(unpacked()) }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        val prompt = EditText(this).apply { hint = "token ids, such as 12 7 93" }
        val names = Facts.ADAPTERS.map { it.name }
        val adapter = Spinner(this).apply {
            this.adapter = ArrayAdapter(context, android.R.layout.simple_spinner_dropdown_item, names)
            setSelection(names.indexOf(Facts.DEFAULT))
        }
        val answer = TextView(this)
        val go = Button(this).apply { text = "Generate" }
        go.setOnClickListener {
            val words = prompt.text.toString()
            val name = adapter.selectedItem.toString()
            answer.text = "…"
            worker.execute {
                val said = runCatching { model.generate(ids(words), name, MOST).joinToString(" ") }
                runOnUiThread { answer.text = said.getOrElse { "error: ${it.message}" } }
            }
        }
        setContentView(
            LinearLayout(this).apply {
                orientation = LinearLayout.VERTICAL
                listOf(prompt, adapter, go, answer).forEach { addView(it) }
            },
        )
    }

    override fun onDestroy() {
        worker.shutdown()
        super.onDestroy()
    }

    private fun ids(words: String): LongArray =
        words.trim().split(Regex("\\s+")).map {
            requireNotNull(it.toLongOrNull()) { "$it is not a token id" }
        }.toLongArray()

    /** The bundle as files, which ONNX Runtime maps: copied out of the app once for each bundle. */
    private fun unpacked(): File {
        val target = File(filesDir, "bundle-${Facts.MANIFEST}")
        if (!target.isDirectory) {
            filesDir.listFiles { file -> file.name.startsWith("bundle-") }?.forEach { it.deleteRecursively() }
            val making = File(filesDir, "bundle-making")
            copy(assets, "bundle", making)
            check(making.renameTo(target)) { "$making cannot be renamed" }
        }
        return target
    }

    private fun copy(assets: AssetManager, from: String, to: File) {
        val inside = assets.list(from).orEmpty()
        if (inside.isEmpty()) {
            assets.open(from).use { input -> to.outputStream().use { input.copyTo(it) } }
            return
        }
        to.mkdirs()
        inside.forEach { copy(assets, "$from/$it", File(to, it)) }
    }
}
